"""Patch models in place: find sites, plan the patch, and replace forwards. Also base classes of patch points."""
