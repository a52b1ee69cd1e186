"""The one error rule, used by tests, ``verify`` and benchmarks alike.

Against the float64 oracle, ``error <= k * (eager_error + 4 * eps(dtype) * max|reference|)``: a kernel may be about as
wrong as plain operations in the same dtype are (the rule of flash-attention's tests), plus a few roundings. ``k`` is 2
for outputs and 3 for gradients; errors are the largest absolute differences; NaN or Inf never passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD = 2.0
GRADIENT = 3.0


def factor(what: str) -> float:
    """The rule's ``k`` for a comparison by its name: names of gradients begin with "gradient"."""
    return GRADIENT if what.startswith("gradient") else FORWARD


@dataclass(frozen=True)
class Check:
    """One comparison under the error rule.

    Attributes:
        what: what was compared.
        error: largest absolute difference of the candidate from the reference; Inf if either is not finite.
        eager_error: the same for plain operations in the candidate's dtype.
        scale: largest absolute value of the reference.
        budget: the largest error that passes.
    """

    what: str
    error: float
    eager_error: float
    scale: float
    budget: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the budget."""
        return math.isfinite(self.budget) and self.error <= self.budget

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILS"
        return (
            f"{self.what}: error {self.error:.3g}, budget {self.budget:.3g} (eager {self.eager_error:.3g}): {verdict}"
        )


def largest_difference(got: Tensor, reference: Tensor) -> float:
    """Largest absolute difference in float64; Inf if anything is not finite or the shapes differ."""
    if got.shape != reference.shape:
        return math.inf
    if got.numel() == 0:
        return 0.0
    worst = float((got.detach().double() - reference.detach().double()).abs().max())
    return worst if math.isfinite(worst) else math.inf


def check(
    what: str,
    got: Tensor,
    reference: Tensor,
    eager: Tensor,
    k: float,
    dtype: torch.dtype | None = None,
    eager_dtype: torch.dtype | None = None,
) -> Check:
    """Compare a result with the float64 reference, given plain operations' result in the same dtype.

    Args:
        what: name for reports.
        got: the candidate.
        reference: float64, same shape.
        eager: what plain operations give in the dtype.
        k: :data:`FORWARD` or :data:`GRADIENT`.
        dtype: the dtype computed in; None: that of ``got``.
        eager_dtype: the dtype of the plain operations, if it is another one (for a float64 candidate there is no
            wider reference to see their error against); their error then counts in proportion of the roundings.
    """
    eps = torch.finfo(got.dtype if dtype is None else dtype).eps
    eager_error = largest_difference(eager, reference)
    if eager_dtype is not None:
        eager_error *= eps / torch.finfo(eager_dtype).eps
    scale = float(reference.detach().abs().max()) if reference.numel() else 0.0
    budget = k * (eager_error + 4 * eps * scale)
    return Check(what, largest_difference(got, reference), eager_error, scale, budget)
