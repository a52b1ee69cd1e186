"""A fake of the ``xformers`` package for machines without a GPU."""

__version__ = "0.0.35"
