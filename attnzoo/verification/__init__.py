"""Check a whole model against the oracle: ``attnzoo.verify``."""
