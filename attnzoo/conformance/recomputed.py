"""A reference for gradient errors: plain operations that compute the scores again in the backward, as kernels do.

A kernel that stores no ``q_len x kv_len`` weights stores the output and the log-sum-exp ``lse`` of each row. The
backward computes the scores a second time, and the weights are ``exp(scores - lse)`` (FlashAttention, Dao et al. 2022,
arXiv:2205.14135, algorithm 4). The second scores have different rounding errors from the scores of the forward.

Usual operations keep the weights of the forward for the backward, so the score gradients of a row add up to zero. With
other weights in the backward, the sum is not zero: it is proportional to ``eps * max|score|``. The query gradient then
has an additional error, because it contains this sum times a mean of the key vectors. Every kernel that computes the
scores again has this error. The operations of this module have this error too, and otherwise those of usual operations.
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
    """Return the output of an attention without dropout. The backward computes the scores again.

    In half precision, scores and weights are float32 and only the output is rounded, as in kernels. ``rows`` are query
    indices ``(n,)``, or None for all queries. ``order`` is the seed of a random order in which keys and components of
    ``head_dim`` are summed. Each order has different rounding errors.
    """
    if rows is None:
        rows = torch.arange(attention.q_len, device=attention.query.device)
    output: Tensor = _Recomputed.apply(attention, rows, order, *attention.tensors())
    return output


@dataclass(frozen=True)
class RecomputedBackend(Backend):
    """Backend that calls :func:`recomputed`. Tests patch whole models with this unregistered backend."""

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
            # The total is linear in values and scores, and treats the gradients above as constants.
            filled = leaves.fill(weights @ values, has_visible_key, rows)
            total = (filled * grad_output).sum() + (scores * grad_scores).sum()
        grads = torch.autograd.grad(total, leaves.tensors(), allow_unused=True, materialize_grads=True)
        return None, None, None, *(grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True))


def _widened(attention: Attention, tensors: Any) -> Attention:
    """Return the attention on detached copies of the tensors, in the dtype in which kernels compute."""
    dtype = torch.promote_types(attention.query.dtype, torch.float32)
    return attention.with_tensors(tuple(tensor.detach().to(dtype, copy=True) for tensor in tensors))


def _permutation(length: int, seed: int, device: torch.device) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed), device="cpu").to(device)


def _in_another_order(attention: Attention, order: int) -> Attention:
    """Return an attention with equal scores, whose products are summed in a random order with seed ``order``."""
    parts = _permutation(attention.head_dim, order, attention.query.device)
    segments = tuple(replace(segment, key=segment.key[..., parts]) for segment in attention.segments)
    return replace(attention, query=(attention.query * attention.scale)[..., parts], segments=segments, scale=1.0)
