"""Adapters: one file per model family, registered by an entry point named after its ``config.model_type``."""
