"""Compare output and gradients of a backend with the float64 oracle, on one attention and sampled query rows."""

from __future__ import annotations

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
from attnzoo.spec.segments import Attention

ALL_ROWS = 1 << 30  # the value of `max_rows` that compares all rows
_MOST_ORDERS, _MANY_ROWS = 8, 256


@dataclass(frozen=True)
class AttentionReport:
    """Comparison of one attention with the float64 oracle on equal inputs.

    Attributes:
        name: name of the attention. In a model, this is the name of the site.
        kernel: name of the kernel that ran.
        checks: a check of the output and, if gradients are compared, a check of :func:`gradient_vector`.
        recall: share of the softmax weight that the changed pattern keeps, as a mean over the compared rows and heads.
            None if the backend does not change the pattern.
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
        """The check with the largest ratio of error to budget."""
        return worst(self.checks)


def worst(checks: Iterable[Check]) -> Check:
    """Return the check with the largest ratio of error to budget."""
    return max(checks, key=lambda check: (not check.ok, check.share))


def check_attention(
    name: str, attention: Attention, backend: str | Backend, *, grad: bool, max_rows: int = 128, seed: int = 0
) -> AttentionReport:
    """Compare a backend with the float64 oracle on one attention, without dropout.

    If the backend declares a change of the pattern (:meth:`Backend.changes`), the oracle computes the changed attention
    (:meth:`Backend.rewrite`).

    For long inputs a sample of query rows is compared. The sample includes the first and the last row. Sampling
    does not change compared values, because output rows are independent and the cotangent of all other rows is zero.

    Args:
        name: name for the report.
        attention: the inputs, for example from the observer of a site.
        backend: a configured backend or a registered name.
        grad: whether to compare gradients too. Bias values get a gradient only if they require grad.
        max_rows: the largest number of query rows to compare.
        seed: seed of the row sample and the cotangent.
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
        result = execute(backend, copy)
        output = result.output[:, :, rows]
        got = (output, *([gradient_vector(output, copy, cotangent)] if grad else []))
        plain_dtype = error_rule.plain_dtype(dtype)
        reference, eager = plain(torch.float64), plain(plain_dtype)
        orders = range(_orders(attention.batch * attention.heads * len(rows)) if grad else 0)
        again = ((), tuple(plain(plain_dtype, partial(recomputed, order=order))[1] for order in orders))
    checks = tuple(
        error_rule.check(what, ours, exact, plain_result, error_rule.factor(what), dtype, plain_dtype, others)
        for what, ours, exact, plain_result, others in zip(
            ("output", "gradient"), got, reference, eager, again, strict=False
        )
    )
    recall = _recall(backend, attention, random_choices, rows) if changed else None
    return AttentionReport(name, result.kernel, checks, recall)


def _orders(rows: int) -> int:
    """Return the number of summation orders to try. With few rows, one order may have small errors by chance."""
    return max(1, min(_MOST_ORDERS, _MANY_ROWS // rows))


def _evaluate(attention: Attention, rows: Tensor) -> Tensor:
    return evaluate(attention, rows).output


@torch.no_grad()
def _recall(backend: Backend, attention: Attention, random_choices: object, rows: Tensor) -> float:
    """Return the share of the softmax weight that a changed pattern keeps. No query may see a key twice."""
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
    """Return, per tensor of the attention, whether to compare the gradient. Untrained biases have no gradient."""
    flags = [True]
    for segment in attention.segments:
        flags += [True, True]
        if segment.bias is not None:
            flags.append(segment.bias.values.requires_grad)
    return flags if attention.empty is None else [*flags, True]


def detached(attention: Attention, dtype: torch.dtype, grad: bool) -> Attention:
    """Return the attention with detached copies of all tensors, in ``dtype``. With ``grad``, copies require grad."""
    pairs = zip(attention.tensors(), _needs_gradient(attention), strict=True)
    copies = (tensor.detach().to(dtype).clone().requires_grad_(grad and flag) for tensor, flag in pairs)
    return attention.with_tensors(tuple(copies))


def gradient_vector(output: Tensor, attention: Attention, cotangent: Tensor) -> Tensor:
    """Return the gradients of all tensors of the attention that require grad, concatenated to one vector.

    The exact gradient of a single tensor may be zero, for example of a query that sees a single key. Then the budget
    would be zero, and rounding errors would fail the check. The whole vector is not zero.
    """
    leaves = [tensor for tensor in attention.tensors() if tensor.requires_grad]
    grads = torch.autograd.grad(output, leaves, cotangent.to(output.dtype), allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])
