"""The error rule and the conformance kit: compare an attention, or all results of a backend, with the oracle."""
