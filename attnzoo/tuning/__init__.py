"""Measure backends on a model. ``attnzoo.auto`` reads the measurements."""
