"""The conformance kit, for authors who test a backend. See :mod:`attnzoo.conformance.kit`."""

from attnzoo.conformance.cases import AttentionCase, cases
from attnzoo.conformance.kit import CaseOutcome, ConformanceError, ConformanceReport, check_backend, run_case

__all__ = [
    "AttentionCase",
    "CaseOutcome",
    "ConformanceError",
    "ConformanceReport",
    "cases",
    "check_backend",
    "run_case",
]
