"""Measure the speed of backends on a model. ``attnzoo.auto`` reads the measurements."""
