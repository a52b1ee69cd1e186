"""Original functions of transformers: their fingerprints, drift from the fingerprints, and how patches replace them."""
