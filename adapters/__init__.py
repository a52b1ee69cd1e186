"""Adapters of model families. The entry point that registers an adapter has the name of its ``config.model_type``."""
