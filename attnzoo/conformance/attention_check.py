"""Judging a backend on one attention: its output and gradients against the float64 oracle's, on sampled rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.backend import Backend
from attnzoo.backends.eager import evaluate, log_mass
from attnzoo.conformance import error_rule
from attnzoo.conformance.attention_report import AttentionReport
from attnzoo.conformance.recomputed import recomputed
from attnzoo.errors import InvalidArgumentError
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention

_ORDERS, _MANY_ROWS = 8, 256


def check_attention(
    name: str,
    attention: Attention,
    backend: str | Backend,
    *,
    grad: bool,
    max_rows: int = 128,
    seed: int = 0,
    kernel: str | None = None,
) -> AttentionReport:
    """Compare a backend with the float64 oracle on one attention, dropout off.

    A backend that changes the pattern is judged by the oracle on the changed one (:meth:`Backend.rewrite`).

    Long inputs are judged on a sample of query rows, first and last included: the oracle's rows do not depend on each
    other, and gradients are those of a cotangent that is zero elsewhere, so both are exact at any length.

    Args:
        name: for the report.
        attention: what to compute, e.g. as a site's observer saw it.
        backend: a configured backend or a name.
        grad: compare the gradients of query, keys and values too (and of bias values that require grad).
        max_rows: how many query rows to judge.
        seed: of the sample and the cotangent.
        kernel: what ran in the model, for the report; None: what runs here.
    """
    check_rows(max_rows)
    made = registry.make_backend(backend) if isinstance(backend, str) else backend
    attention = replace(attention, dropout=0.0)
    generator = torch.Generator().manual_seed(seed)
    rows = _sample(attention.q_len, max_rows, generator).to(attention.query.device)
    shape = (attention.batch, attention.heads, len(rows), attention.value_dim)
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(attention.query.device)

    choices = made.choices(attention)

    def plain(dtype: torch.dtype, run: Callable[[Attention, Tensor], Tensor] = _evaluated) -> tuple[Tensor, ...]:
        own = _leaves(attention, dtype, grad)
        output = run(made.rewrite(own, choices), rows)
        return output, *([_gradient(output, own, cotangent)] if grad else [])

    own = _leaves(attention, attention.query.dtype, grad)
    with torch.set_grad_enabled(grad):
        result = execute(made, own)
        output = result.output[:, :, rows]
        got = (output, *([_gradient(output, own, cotangent)] if grad else []))
        # There is no wider reference to see the roundings of float64 against: take those of float32 in proportion.
        narrow = torch.float32 if attention.query.dtype == torch.float64 else None
        reference, eager = plain(torch.float64), plain(narrow or attention.query.dtype)
        again: list[tuple[Tensor, ...]] = [()]
        if grad:
            orders = range(_orders(attention.batch * attention.heads * len(rows)))
            runs = (partial(recomputed, order=order) for order in orders)
            again.append(tuple(plain(narrow or attention.query.dtype, run)[1] for run in runs))
    checks = tuple(
        error_rule.check(label, candidate, true, kept, error_rule.factor(label), attention.query.dtype, narrow, other)
        for label, candidate, true, kept, other in zip(
            ("output", "gradient"), got, reference, eager, again, strict=False
        )
    )
    recall = None if made.changes(attention.request()) is None else _recall(made, attention, choices, rows)
    return AttentionReport(name, kernel or result.kernel, checks, recall)


def _orders(rows: int) -> int:
    """How many orders of summation to try: among few rows, a single one may round well by luck."""
    return max(1, min(_ORDERS, _MANY_ROWS // rows))


def _evaluated(attention: Attention, rows: Tensor) -> Tensor:
    return evaluate(attention, rows).output


@torch.no_grad()
def _recall(backend: Backend, attention: Attention, choices: object, rows: Tensor) -> float:
    """Each key is seen once, so the weight of those still seen is how much their scores add up to."""
    plain = _leaves(attention, torch.float64, False)
    whole, left = log_mass(plain, rows), log_mass(backend.rewrite(plain, choices), rows)
    real = whole > float("-inf")
    if attention.query_mask is not None:
        real = real & attention.query_mask[:, None, rows]
    return float((left - whole)[real].exp().mean()) if bool(real.any()) else 1.0


def check_rows(most: object) -> None:
    """Raise :class:`InvalidArgumentError` unless this is a number of rows to judge."""
    if isinstance(most, bool) or not isinstance(most, int) or most < 2:
        raise InvalidArgumentError("max_rows", repr(most), "an integer >= 2: the first and the last row are among them")


def _sample(length: int, most: int, generator: torch.Generator) -> Tensor:
    if length <= most:
        return torch.arange(length, device="cpu")
    inner = torch.randperm(length - 2, generator=generator, device="cpu")[: most - 2] + 1
    return torch.cat([inner.new_tensor([0]), inner.sort().values, inner.new_tensor([length - 1])])


def _trained(attention: Attention) -> list[bool]:
    """Which of the attention's tensors get a gradient in a check: not a bias that needs none in the model."""
    flags = [True]
    for segment in attention.segments:
        flags += [True, True]
        if segment.bias is not None:
            flags.append(segment.bias.values.requires_grad)
    return flags if attention.empty is None else [*flags, True]


def _leaves(attention: Attention, dtype: torch.dtype, grad: bool) -> Attention:
    """The attention on detached tensors of a dtype."""
    pairs = zip(attention.tensors(), _trained(attention), strict=True)
    return attention.with_tensors(
        tuple(t.detach().to(dtype).clone().requires_grad_(grad and flag) for t, flag in pairs)
    )


def _gradient(output: Tensor, attention: Attention, cotangent: Tensor) -> Tensor:
    """The gradient with respect to every tensor that has one, as a single vector.

    One of them may be zero but for rounding (a query's, when it sees a single key), and rounding has no budget of its
    own; together they have a scale.
    """
    leaves = [tensor for tensor in attention.tensors() if tensor.requires_grad]
    grads = torch.autograd.grad(output, leaves, cotangent.to(output.dtype), allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])
