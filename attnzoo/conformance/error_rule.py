"""The one error rule, used by tests, ``verify`` and benchmarks alike.

Against the float64 oracle, ``error <= k * (plain_error + 4 * eps(dtype) * max|reference|)``: a kernel may be about as
wrong as plain operations in the same dtype are (the rule of flash-attention's tests), plus a few roundings. ``k`` is 2
for outputs and 3 for gradients; errors are the largest absolute differences; NaN or Inf never passes.

For outputs, ``plain_error`` is that of ``eager`` in the same dtype. For gradients it is the larger of two: that of
``eager``, which keeps its weights from the forward, and that of plain operations which compute the scores again in the
backward (``recomputed``), as every kernel does that stores no weights. Both are measured on the same inputs.
Neither depends on the candidate. The second differs from ``eager`` only in that it rounds the scores twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD = 2.0
GRADIENT = 3.0
_AT_ONCE = 1 << 17


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
        recomputed_error: of a gradient, the same for plain operations whose backward computes the scores again.
    """

    what: str
    error: float
    eager_error: float
    scale: float
    budget: float
    recomputed_error: float = 0.0

    @property
    def share(self) -> float:
        """The error in parts of the budget: at most 1 passes."""
        if self.error == 0.0 or not math.isfinite(self.error):
            return self.error
        return self.error / self.budget if self.budget else math.inf

    @property
    def ok(self) -> bool:
        """Whether the error is within the budget."""
        return math.isfinite(self.budget) and self.error <= self.budget

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILS"
        plain = f"eager {self.eager_error:.3g}"
        if self.recomputed_error:
            plain += f", recomputed {self.recomputed_error:.3g}"
        return f"{self.what}: error {self.error:.3g}, budget {self.budget:.3g} ({plain}): {verdict}"


def largest_difference(got: Tensor, reference: Tensor) -> float:
    """Largest absolute difference in float64; Inf if anything is not finite or the shapes differ."""
    if got.shape != reference.shape:
        return math.inf
    if got.numel() == 0:
        return 0.0
    worst = 0.0
    pieces = (tensor.detach().flatten().split(_AT_ONCE) for tensor in (got, reference))
    for piece, true in zip(*pieces, strict=True):  # wide copies of all of it would not stay in the cache
        far = float((piece.double() - true.double()).abs().max())
        if not math.isfinite(far):
            return math.inf
        worst = max(worst, far)
    return worst


def check(
    what: str,
    got: Tensor,
    reference: Tensor,
    eager: Tensor,
    k: float,
    dtype: torch.dtype | None = None,
    eager_dtype: torch.dtype | None = None,
    recomputed: Sequence[Tensor] = (),
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
        recomputed: of a gradient, what plain operations of that dtype give whose backward computes the scores again,
            each in another order of summation; the largest of their errors counts.
    """
    eps = torch.finfo(got.dtype if dtype is None else dtype).eps
    ratio = 1.0 if eager_dtype is None else eps / torch.finfo(eager_dtype).eps
    eager_error = largest_difference(eager, reference) * ratio
    recomputed_error = max((largest_difference(other, reference) for other in recomputed), default=0.0) * ratio
    scale = float(reference.detach().abs().max()) if reference.numel() else 0.0
    budget = k * (max(eager_error, recomputed_error) + 4 * eps * scale)
    return Check(what, largest_difference(got, reference), eager_error, scale, budget, recomputed_error)
