"""Functions that fingerprint the original functions of transformers, find drift, and replace forwards."""
