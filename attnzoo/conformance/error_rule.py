"""The error rule: how large an error may be. Tests, ``verify``, ``tune`` and the benchmarks share this rule.

A result passes if ``error <= k * (plain_error + ROUNDINGS * eps(dtype) * max|reference|)``. Errors are largest absolute
differences from the float64 oracle. ``k`` is :data:`FORWARD` for outputs and :data:`GRADIENT` for gradients. NaN and
Inf never pass. In words: a kernel may be about as wrong as plain operations in the same dtype (the rule of
flash-attention's tests), plus a few roundings.

For outputs, ``plain_error`` is the error of ``eager``. For gradients, it is the larger error of two: that of
``eager``, which uses the softmax weights of the forward in the backward, and that of plain operations that compute the
scores again in the backward (:mod:`attnzoo.conformance.recomputed`), as every kernel does that stores no weights. Both
are measured on the inputs of the candidate, and neither depends on the candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD = 2.0
GRADIENT = 3.0
ROUNDINGS = 4
_ELEMENTS_AT_ONCE = 1 << 17


def factor(what: str) -> float:
    """The ``k`` of a comparison by its name: names of gradients begin with "gradient"."""
    return GRADIENT if what.startswith("gradient") else FORWARD


def allowed_error(k: float, plain_error: float, scale: float, dtype: torch.dtype) -> float:
    """The largest error that passes; ``scale`` is the largest absolute value of the reference."""
    return k * (plain_error + ROUNDINGS * torch.finfo(dtype).eps * scale)


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which plain operations run for a candidate of a dtype.

    It is the same dtype, except that there is no wider reference for float64: plain operations run in float32 there,
    and :func:`check` scales their error by the ratio of the epsilons.
    """
    return torch.float32 if dtype == torch.float64 else dtype


@dataclass(frozen=True)
class Check:
    """One comparison under the error rule.

    Attributes:
        what: what was compared.
        error: largest absolute difference of the candidate from the reference; Inf if either is not finite.
        eager_error: the same for plain operations in the candidate's dtype.
        scale: largest absolute value of the reference.
        budget: the largest error that passes.
        recomputed_error: for gradients, the error of plain operations that compute the scores again in the backward.
    """

    what: str
    error: float
    eager_error: float
    scale: float
    budget: float
    recomputed_error: float = 0.0

    @property
    def share(self) -> float:
        """The error divided by the budget: at most 1 passes."""
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
    """Largest absolute difference in float64; Inf if a value is not finite or the shapes differ."""
    if got.shape != reference.shape:
        return math.inf
    if got.numel() == 0:
        return 0.0
    largest = 0.0
    pieces = (tensor.detach().flatten().split(_ELEMENTS_AT_ONCE) for tensor in (got, reference))
    for piece, reference_piece in zip(*pieces, strict=True):  # a float64 copy of a whole tensor would not fit the cache
        difference = float((piece.double() - reference_piece.double()).abs().max())
        if not math.isfinite(difference):
            return math.inf
        largest = max(largest, difference)
    return largest


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
    """Compare a result with the float64 reference.

    Args:
        what: name for reports.
        got: the candidate.
        reference: the result in float64, same shape.
        eager: the result of plain operations.
        k: :data:`FORWARD` or :data:`GRADIENT`.
        dtype: the dtype of the candidate's computation; None: that of ``got``.
        eager_dtype: the dtype of the plain operations (:func:`plain_dtype`); None: ``dtype``.
        recomputed: for gradients, the results of plain operations that compute the scores again in the backward, one
            per order of summation. The largest of their errors counts.
    """
    dtype = got.dtype if dtype is None else dtype
    ratio = 1.0 if eager_dtype is None else torch.finfo(dtype).eps / torch.finfo(eager_dtype).eps
    eager_error = largest_difference(eager, reference) * ratio
    recomputed_error = max((largest_difference(other, reference) for other in recomputed), default=0.0) * ratio
    scale = float(reference.detach().abs().max()) if reference.numel() else 0.0
    budget = allowed_error(k, max(eager_error, recomputed_error), scale, dtype)
    return Check(what, largest_difference(got, reference), eager_error, scale, budget, recomputed_error)
