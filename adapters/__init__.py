"""Adapters of model families. The name of an adapter's entry point is the ``config.model_type`` of the models."""
