"""Measuring backends on a model: the race, the tuner, and its report. What ``auto`` reads is in ``attnzoo.auto``."""
