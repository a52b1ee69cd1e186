"""Check one attention, or a whole backend, against the oracle: the error rule and the conformance kit."""
