"""Judging one attention against the oracle: the error rule, its budgets, and the conformance kit."""
