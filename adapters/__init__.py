"""Adapters: one file per model family, found by entry point, keyed by ``config.model_type``."""
