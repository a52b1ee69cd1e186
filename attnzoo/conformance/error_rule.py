"""The error rule: the largest error that passes. Tests, ``verify``, ``tune`` and the benchmarks share this rule.

A result passes if ``error <= k * (plain_error + ROUNDINGS * eps(dtype) * max|reference|)``. An error is the largest
absolute difference from the float64 oracle. ``k`` is :data:`FORWARD` for outputs and :data:`GRADIENT` for gradients.
NaN and Inf never pass. So the error of a kernel may be a small multiple of the error of plain PyTorch operations in the
same dtype, as in the tests of flash-attention, plus a few roundings.

For outputs, ``plain_error`` is the error of ``eager``. For gradients, ``plain_error`` is the larger of two errors. The
first is the error of ``eager``, which uses the softmax weights of the forward in the backward. The second is the error
of plain operations that compute the scores again in the backward (:mod:`attnzoo.conformance.recomputed`), because every
kernel that stores no weights does this. Both errors depend only on the inputs of the kernel, not on the result.
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
    """Return ``k`` of the error rule: :data:`GRADIENT` if ``what`` begins with "gradient", else :data:`FORWARD`."""
    return GRADIENT if what.startswith("gradient") else FORWARD


def allowed_error(k: float, plain_error: float, scale: float, dtype: torch.dtype) -> float:
    """Return the largest error that passes, by the formula of this module. ``scale`` is ``max|reference|``."""
    return k * (plain_error + ROUNDINGS * torch.finfo(dtype).eps * scale)


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which to run plain operations for the comparison with a candidate in ``dtype``.

    This is ``dtype``, except for float64. In float64, plain operations would equal the reference and have no error. So
    they run in float32, and :func:`check` multiplies their error by ``eps(float64) / eps(float32)``.
    """
    return torch.float32 if dtype == torch.float64 else dtype


@dataclass(frozen=True)
class Check:
    """One comparison under the error rule.

    Attributes:
        what: name of the compared result, e.g. ``"output"``.
        error: largest absolute difference between candidate and reference, or Inf if a value is not finite.
        eager_error: error of plain operations (``eager``) in the dtype of the candidate.
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
        """The error divided by the budget. A share of at most 1 passes."""
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
    """Return the largest absolute difference in float64, or Inf if a value is not finite or the shapes differ."""
    if got.shape != reference.shape:
        return math.inf
    if got.numel() == 0:
        return 0.0
    largest = 0.0
    pieces = (tensor.detach().flatten().split(_ELEMENTS_AT_ONCE) for tensor in (got, reference))
    for piece, reference_piece in zip(*pieces, strict=True):  # a float64 copy of all values would exceed the CPU cache
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
        what: name of the result in reports, e.g. ``"output"``.
        got: the result to check (the candidate).
        reference: the result of the oracle in float64, with the shape of ``got``.
        eager: the result of plain operations.
        k: :data:`FORWARD` or :data:`GRADIENT`.
        dtype: the dtype in which the candidate computes. None means the dtype of ``got``.
        eager_dtype: the dtype of the plain operations (:func:`plain_dtype`). None means ``dtype``.
        recomputed: for gradients, the results of plain operations that compute the scores again in the backward, one
            per order of summation. The largest error counts.
    """
    dtype = got.dtype if dtype is None else dtype
    ratio = 1.0 if eager_dtype is None else torch.finfo(dtype).eps / torch.finfo(eager_dtype).eps
    eager_error = largest_difference(eager, reference) * ratio
    recomputed_error = max((largest_difference(other, reference) for other in recomputed), default=0.0) * ratio
    scale = float(reference.detach().abs().max()) if reference.numel() else 0.0
    budget = allowed_error(k, max(eager_error, recomputed_error), scale, dtype)
    return Check(what, largest_difference(got, reference), eager_error, scale, budget, recomputed_error)
