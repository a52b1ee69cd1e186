"""Compare output and gradients of a backend with the float64 oracle, on one attention and sampled query rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.backend import Backend
from attnzoo.backends.eager import evaluate, log_mass
from attnzoo.conformance import error_rule
from attnzoo.conformance.error_rule import Check
from attnzoo.conformance.recomputed import recomputed
from attnzoo.errors import InvalidArgumentError
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.segments import Attention, Result

ALL_ROWS = 1 << 30  # the value of `max_rows` that compares all rows
_MOST_ORDERS, _MANY_ROWS = 8, 256


@dataclass(frozen=True)
class AttentionReport:
    """Comparison of one attention with the float64 oracle on equal inputs.

    Attributes:
        name: name of the attention. In a model, this is the name of the site.
        kernel: name of the kernel that ran.
        checks: a check of the output and, if gradients are compared, a check of :func:`gradient_vector`.
        recall: share of the softmax weight that is on keys of the changed pattern, as a mean over the compared rows
            and heads. None if the backend does not change the pattern.
    """

    name: str
    kernel: str
    checks: tuple[Check, ...]
    recall: float | None = None

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return all(check.ok for check in self.checks)

    @property
    def worst(self) -> Check:
        """The check with the largest ratio of error to budget. Failed checks come first."""
        return worst(self.checks)


def worst(checks: Iterable[Check]) -> Check:
    """Return the check with the largest ratio of error to budget. Failed checks come first."""
    return max(checks, key=lambda check: (not check.ok, check.share))


def check_attention(
    name: str,
    attention: Attention,
    backend: str | Backend,
    *,
    grad: bool,
    max_rows: int = 128,
    seed: int = 0,
    result: Result | None = None,
) -> AttentionReport:
    """Compare a backend with the float64 oracle on one attention, without dropout.

    If the backend declares a change of the pattern (:meth:`Backend.changes`), the oracle computes the changed attention
    (:meth:`Backend.rewrite`).

    For long inputs, only a sample of query rows is compared, including the first and the last row. The oracle computes
    only these rows. The gradients are still comparable, because the cotangent of all other rows is zero.

    A backend that writes into its inputs fails, because a model uses the tensors again (for example, the keys of the KV
    cache). The report then contains a failed check of the inputs.

    Args:
        name: name of the attention in the report.
        attention: the attention to compute, for example from the ``observer`` of a :class:`Site`.
        backend: a configured backend or a registered name.
        grad: whether to compare gradients too. Bias values get a gradient only if they require grad.
        max_rows: the largest number of query rows to compare.
        seed: seed of the row sample and the cotangent.
        result: the result of an earlier run of the backend, to compare without gradients. None runs the backend now.
    """
    check_max_rows(max_rows)
    backend = registry.make_backend(backend) if isinstance(backend, str) else backend
    attention = replace(attention, dropout=0.0)
    device, dtype = attention.query.device, attention.query.dtype
    generator = torch.Generator().manual_seed(seed)
    rows = _sampled_rows(attention.q_len, max_rows, generator).to(device)
    shape = (attention.batch, attention.heads, len(rows), attention.value_dim)
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device)
    changed = backend.changes(attention.request()) is not None
    random_choices = backend.decisions(attention) if changed else None

    def plain(dtype: torch.dtype, run: Callable[[Attention, Tensor], Tensor] = _evaluate) -> tuple[Tensor, ...]:
        copy = detached(attention, dtype, grad)
        output = run(backend.rewrite(copy, random_choices) if changed else copy, rows)
        return output, *([gradient_vector(output, copy, cotangent)] if grad else [])

    copy = detached(attention, dtype, grad)
    with torch.set_grad_enabled(grad):
        plain_dtype = error_rule.plain_dtype(dtype)
        # This must run before the backend: the copies share the masks with the backend, which may change them.
        reference, eager = plain(torch.float64), plain(plain_dtype)
        versions = _versions(attention)
        result = execute(backend, copy) if result is None else result
        output = result.output[:, :, rows]
        got = (output, *([gradient_vector(output, copy, cotangent)] if grad else []))
        wrote_inputs = _versions(attention) != versions or not _are_equal(copy.tensors(), attention.tensors())
        orders = range(_orders(attention.batch * attention.heads * len(rows)) if grad else 0)
        again = (plain(plain_dtype, partial(recomputed, order=order))[1] for order in orders)
        checks = tuple(
            _compare(what, ours, exact, plain_result, (dtype, plain_dtype), others)
            for what, ours, exact, plain_result, others in zip(
                ("output", "gradient"), got, reference, eager, ((), again), strict=False
            )
        )
    if wrote_inputs:
        checks += (Check("inputs, which the backend must not change", math.inf, 0.0, 0.0, 0.0),)
    recall = _recall(backend, attention, random_choices, rows) if changed else None
    return AttentionReport(name, result.kernel, checks, recall)


def _compare(
    what: str,
    got: Tensor,
    reference: Tensor,
    eager: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    recomputed: Iterable[Tensor],
) -> Check:
    """Apply the error rule. Further elements of ``recomputed`` are computed only while the check fails."""
    rule = partial(error_rule.check, what, got, reference, eager, error_rule.factor(what), *dtypes)
    check, tried = None, list[Tensor]()
    for again in recomputed:
        tried.append(again)
        check = rule(tried)
        if check.ok:
            break
    return check or rule()


def _orders(rows: int) -> int:
    """Return how many random summation orders to try: more for few rows, whose errors may all be small by chance.

    A larger error of plain operations allows more. So orders after the first matter only if the check fails.
    """
    return max(1, min(_MOST_ORDERS, _MANY_ROWS // rows))


def _versions(attention: Attention) -> list[int]:
    """Return how often each mask and each tensor of bias positions was changed in place.

    Inference tensors are left out, because PyTorch does not count their changes.
    """
    tensors = [attention.query_mask]
    for segment in attention.segments:
        positions = segment.bias.positions if isinstance(segment.bias, RelativeBias) else None
        tensors += [segment.key_mask, segment.mask, positions]
    return [tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference()]


def _are_equal(copies: Iterable[Tensor], tensors: Iterable[Tensor]) -> bool:
    """Return whether each copy still has the values of its tensor. NaN equals NaN."""
    pairs = ((copy.detach(), tensor.detach().to(copy.dtype)) for copy, tensor in zip(copies, tensors, strict=True))
    return all(bool(((copy == tensor) | (copy.isnan() & tensor.isnan())).all()) for copy, tensor in pairs)


def _evaluate(attention: Attention, rows: Tensor) -> Tensor:
    return evaluate(attention, rows).output


@torch.no_grad()
def _recall(backend: Backend, attention: Attention, random_choices: object, rows: Tensor) -> float:
    """Return :attr:`AttentionReport.recall`. The changed pattern must not show a key to a query twice."""
    wide = detached(attention, torch.float64, False)
    before, after = log_mass(wide, rows), log_mass(backend.rewrite(wide, random_choices), rows)
    counted = before > float("-inf")
    if attention.query_mask is not None:
        counted = counted & attention.query_mask[:, None, rows]
    return float((after - before)[counted].exp().mean()) if bool(counted.any()) else 1.0


def check_max_rows(max_rows: object) -> None:
    """Raise :class:`InvalidArgumentError` if ``max_rows`` is not an integer of at least 2."""
    if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 2:
        allowed = "an integer >= 2, because the first and the last row are always compared"
        raise InvalidArgumentError("max_rows", repr(max_rows), allowed)


def _sampled_rows(length: int, max_rows: int, generator: torch.Generator) -> Tensor:
    if length <= max_rows:
        return torch.arange(length, device="cpu")
    inner = torch.randperm(length - 2, generator=generator, device="cpu")[: max_rows - 2] + 1
    return torch.cat([inner.new_tensor([0]), inner.sort().values, inner.new_tensor([length - 1])])


def _needs_gradient(attention: Attention) -> list[bool]:
    """Return a flag for each of ``attention.tensors()``: False for biases that do not require grad, else True."""
    flags = [True]
    for segment in attention.segments:
        flags += [True, True]
        if segment.bias is not None:
            flags.append(segment.bias.values.requires_grad)
    return flags if attention.empty is None else [*flags, True]


def detached(attention: Attention, dtype: torch.dtype, grad: bool) -> Attention:
    """Return the attention on detached copies of all tensors, in ``dtype``. With ``grad``, the copies require grad."""
    pairs = zip(attention.tensors(), _needs_gradient(attention), strict=True)
    copies = (tensor.detach().to(dtype).clone().requires_grad_(grad and flag) for tensor, flag in pairs)
    return attention.with_tensors(tuple(copies))


def gradient_vector(output: Tensor, attention: Attention, cotangent: Tensor) -> Tensor:
    """Return the gradients of all tensors of the attention that require grad, concatenated to one vector.

    The exact gradient of a single tensor may be zero. For example, the query has gradient zero if it sees a single key.
    Then the allowed error would be zero, and rounding errors would fail the check. The whole vector is not zero.
    An output without a graph has zero gradients.
    """
    leaves = [tensor for tensor in attention.tensors() if tensor.requires_grad]
    if not output.requires_grad:
        return torch.cat([torch.zeros_like(leaf).flatten() for leaf in leaves])
    grads = torch.autograd.grad(output, leaves, cotangent.to(output.dtype), allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])
