"""Plain operations that compute the scores again in the backward: the second yardstick for gradients.

A kernel that stores no ``q_len x kv_len`` weights keeps the output and the log-sum-exp ``lse`` of each row. Its
backward computes the scores a second time and takes ``exp(scores - lse)`` for the weights (FlashAttention, Dao et al.
2022, arXiv:2205.14135, algorithm 4). The second scores are rounded in another order than those behind ``lse`` and the
output.

Plain operations use the same weights in both directions, so most of a score's rounding cancels: the score gradients of
a row add up to zero. After two roundings they add up to about ``eps * max|score|``. The component that all keys share
then appears in the gradient of the query. No kernel of this kind can avoid this error, and this module adds no other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.backend import Backend, Capabilities
from attnzoo.backends.eager import EagerBackend, grid, joined_values
from attnzoo.spec.segments import Attention, Result


def recomputed(attention: Attention, rows: Tensor | None = None, order: int = 0) -> Tensor:
    """The output of an attention without dropout; its backward computes the scores again.

    In half precision, scores and weights are float32 and the output is rounded, as in kernels. ``rows`` are query
    indices ``(n,)``; None: all. ``order`` is the seed of the order in which keys and components of ``head_dim`` are
    summed: each order rounds differently.
    """
    if rows is None:
        rows = torch.arange(attention.q_len, device=attention.query.device)
    output: Tensor = _Recomputed.apply(attention, rows, order, *attention.tensors())
    return output


@dataclass(frozen=True)
class RecomputedBackend(Backend):
    """:func:`recomputed` as a backend, to patch whole models with. It is a yardstick and is not registered."""

    name: ClassVar[str] = "recomputed"
    capabilities: ClassVar[Capabilities] = replace(EagerBackend.capabilities, dropout=False, probabilities=False)

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        return Result(recomputed(attention), self.name)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention: Attention, rows: Tensor, order: int, *tensors: Tensor) -> Tensor:
        wide = _widened(attention, tensors)
        scores, visible = grid(wide, rows)
        highest = scores.masked_fill(~visible, float("-inf")).amax(-1, keepdim=True)
        has_visible_key = highest > float("-inf")
        powers = (scores - highest.masked_fill(~has_visible_key, 0.0)).exp().masked_fill(~visible, 0.0)
        keys = _permutation(scores.shape[-1], order, scores.device)
        total = powers.sum(-1, keepdim=True).masked_fill(~has_visible_key, 1.0)
        output = powers[..., keys] @ joined_values(wide)[:, :, keys] / total
        output = wide.fill(output, has_visible_key.squeeze(-1), rows).to(attention.query.dtype)
        ctx.attention, ctx.rows, ctx.order = attention, rows, order
        ctx.save_for_backward(*tensors, output, (highest + total.log()).squeeze(-1))
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        attention, rows = ctx.attention, ctx.rows
        *tensors, output, lse = ctx.saved_tensors
        with torch.enable_grad():
            leaves = _widened(attention, tensors)
            for tensor in leaves.tensors():
                tensor.requires_grad_()
            scores, visible = grid(_in_another_order(leaves, ctx.order), rows)
            values = joined_values(leaves)
        grad_output, output = grad_output.to(values.dtype), output.to(values.dtype)
        has_visible_key = lse > float("-inf")
        weights = (scores - lse.masked_fill(~has_visible_key, 0.0)[..., None]).exp().masked_fill(~visible, 0.0).detach()
        if attention.query_mask is not None:
            weights = weights * attention.query_mask[:, None, rows, None]
        mean = (grad_output * output).sum(-1, keepdim=True)
        grad_scores = weights * (grad_output @ values.detach().transpose(-1, -2) - mean)
        with torch.enable_grad():
            # Linear in values and scores; the gradients above enter as constants.
            filled = leaves.fill(weights @ values, has_visible_key, rows)
            total = (filled * grad_output).sum() + (scores * grad_scores).sum()
        grads = torch.autograd.grad(total, leaves.tensors(), allow_unused=True, materialize_grads=True)
        return None, None, None, *(grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True))


def _widened(attention: Attention, tensors: Any) -> Attention:
    """The attention on detached copies of the tensors, in the dtype in which kernels compute."""
    dtype = torch.promote_types(attention.query.dtype, torch.float32)
    return attention.with_tensors(tuple(tensor.detach().to(dtype, copy=True) for tensor in tensors))


def _permutation(length: int, seed: int, device: torch.device) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed), device="cpu").to(device)


def _in_another_order(attention: Attention, order: int) -> Attention:
    """The same scores, but scaled before the product instead of after it, and summed in another order."""
    parts = _permutation(attention.head_dim, order, attention.query.device)
    segments = tuple(replace(segment, key=segment.key[..., parts]) for segment in attention.segments)
    return replace(attention, query=(attention.query * attention.scale)[..., parts], segments=segments, scale=1.0)
