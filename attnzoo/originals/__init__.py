"""The original functions of transformers: fingerprints, drift from them, and the slots patches replace."""
