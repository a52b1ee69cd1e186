"""The conformance kit for authors of backends: see :mod:`attnzoo.conformance.kit`.

Example:
    >>> import torch, attnzoo
    >>> attnzoo.testing.check_backend("eager", dtypes=(torch.float64,)).failures
    ()
"""

from attnzoo.conformance.kit import (
    AttentionCase,
    Conformance,
    ConformanceError,
    Outcome,
    cases,
    check_backend,
    run_case,
)

__all__ = ["AttentionCase", "Conformance", "ConformanceError", "Outcome", "cases", "check_backend", "run_case"]
