"""Patch models in place: sites, plans, forwards, and the base classes of adapters."""
