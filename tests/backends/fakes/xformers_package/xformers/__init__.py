"""Stands in for the ``xformers`` package where there is no GPU."""

__version__ = "0.0.35"
