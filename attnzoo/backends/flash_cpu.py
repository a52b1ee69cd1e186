"""Blocked union attention on PyTorch's CPU FlashAttention kernel, forward and backward.

Each block of queries attends to each of its parts with the kernel, which returns ``(out, lse)``; parts are united by
log-sum-exp (:mod:`attnzoo.union`). Keys and values are read in place: a part is a view, nothing is gathered or copied.
Saved for the backward are the inputs, the output and ``lse``; each part's backward gets the final out and lse.

The kernel behind ``scaled_dot_product_attention`` on the CPU does not hand out its ``lse`` through a public function, so
two private operators of PyTorch are called. :func:`unavailable` guards for their signatures; the sdpa backend
then takes its slower public path. ``tests/backends/test_flash_cpu.py`` pins their behaviour.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnzoo.backends.blocks import Block, Masks, Part, additive, block_size, blocks
from attnzoo.backends.eager import expand_heads
from attnzoo.segments import Attention
from attnzoo.union import merge_

KERNEL = "flash_cpu"
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


@cache
def unavailable() -> str | None:
    """Why the private operators cannot be used with this PyTorch, or None."""
    expected = {
        _FORWARD: ["query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"],
        _BACKWARD: [
            *("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal", "attn_mask", "scale")
        ],
    }
    for name, arguments in expected.items():
        op = getattr(torch.ops.aten, name, None)
        if op is None:
            return f"torch {torch.__version__} has no aten::{name}"
        if [argument.name for argument in op.default._schema.arguments] != arguments:
            return f"torch {torch.__version__} changed the arguments of aten::{name}"
    return None


def attend(attention: Attention) -> Tensor:
    """The attention's output ``(batch, heads, q_len, value_dim)``.

    For CPU tensors with ``value_dim == head_dim``, no dropout, and biases that need no gradient.
    """
    return _Blocked.apply(_hollow(attention), *_qkv(attention))


def _qkv(attention: Attention) -> list[Tensor]:
    return [attention.query, *(t for segment in attention.segments for t in (segment.key, segment.value))]


def _hollow(attention: Attention) -> Attention:
    """The attention with query, keys and values that have a shape and no storage, so that the graph does not hold them twice."""

    def shell(tensor: Tensor) -> Tensor:
        return tensor.detach().new_empty(()).expand(tensor.shape)

    segments = tuple(
        replace(
            segment,
            key=shell(segment.key),
            value=shell(segment.value),
            bias=None if segment.bias is None else replace(segment.bias, values=segment.bias.values.detach()),
        )
        for segment in attention.segments
    )
    return replace(attention, query=shell(attention.query), segments=segments)


class _AdditiveMasks:
    """The additive mask each part's kernel call takes, and its live rows; the last one per pattern is reused."""

    def __init__(self, attention: Attention) -> None:
        self._masks, self._attention = Masks(attention), attention
        self._last: dict[int, tuple[Any, Tensor | None]] = {}

    def of(self, block: Block, part: Part) -> tuple[Tensor | None, Tensor | None]:
        mask, bias = self._masks.of(block, part), self._masks.bias(block, part)
        attention = self._attention
        full = (attention.batch, attention.heads, block.q_stop - block.q_start, part.kv_stop - part.kv_start)
        if mask is None:
            term = additive(None, bias, attention.query.dtype)
            return (None if term is None else term.expand(full)), None
        known = self._last.get(part.segment)
        if bias is None and known is not None and known[0] is mask:
            return known[1], mask.live
        term = additive(mask.seen, bias, attention.query.dtype)
        term = None if term is None else term.expand(full)
        self._last[part.segment] = (mask, term)
        return term, mask.live


class _Blocked(torch.autograd.Function):
    """Forward over blocks and parts; backward over the same."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, query: Tensor, *keys_values: Tensor) -> Tensor:
        batch, heads, q_len, dim = query.shape
        accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = query.new_empty((batch, q_len, heads, dim)).transpose(1, 2)  # (batch, q_len, heads, dim) in memory
        lse = query.new_full((batch, q_len, heads), float("-inf"), dtype=accumulate).transpose(1, 2)
        masks = _AdditiveMasks(attention)
        for block in blocks(attention, block_size(attention)):
            rows = slice(block.q_start, block.q_stop)
            q, total, total_lse = query[:, :, rows], None, lse[:, :, rows]
            for part in block.parts:
                key, value = _part(keys_values, part, heads)
                mask, live = masks.of(block, part)
                part_out, part_lse = getattr(torch.ops.aten, _FORWARD)(
                    q, key, value, 0.0, False, attn_mask=mask, scale=attention.scale
                )
                if live is not None:  # the kernel returns lse 0 for a row that sees nothing; its true lse is -inf
                    part_lse = part_lse.masked_fill(~live, float("-inf"))
                if total is None:
                    total = part_out if len(block.parts) == 1 else part_out.to(accumulate)
                    total_lse.copy_(part_lse)
                else:
                    merge_(total, total_lse, part_out, part_lse)
            out[:, :, rows] = 0.0 if total is None else total
        if attention.query_mask is not None:
            out.masked_fill_(~attention.query_mask[:, None, :, None], 0.0)
        ctx.attention = attention
        ctx.save_for_backward(query, *keys_values, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        attention: Attention = ctx.attention
        query, *keys_values, out, lse = ctx.saved_tensors
        if attention.query_mask is not None:
            grad_out = grad_out.masked_fill(~attention.query_mask[:, None, :, None], 0.0)
        # Rows that see nothing have lse -inf, and the kernel would form inf - inf; with 0 their weights become 0.
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        accumulate = lse.dtype
        grads = [torch.zeros(tensor.shape, dtype=accumulate) for tensor in (query, *keys_values)]
        masks = _AdditiveMasks(attention)
        for block in blocks(attention, block_size(attention)):
            rows = slice(block.q_start, block.q_stop)
            for part in block.parts:
                key, value = _part(tuple(keys_values), part, attention.heads)
                mask, _ = masks.of(block, part)
                grad_q, grad_k, grad_v = getattr(torch.ops.aten, _BACKWARD)(
                    *(grad_out[:, :, rows], query[:, :, rows], key, value, out[:, :, rows], lse[:, :, rows]),
                    *(0.0, False),
                    attn_mask=mask,
                    scale=attention.scale,
                )
                grads[0][:, :, rows] += grad_q
                keys = slice(part.kv_start, part.kv_stop)
                for index, grad in ((2 * part.segment + 1, grad_k), (2 * part.segment + 2, grad_v)):
                    grads[index][:, :, keys] += _sum_groups(grad, grads[index].shape[1])
        return None, *(grad.to(query.dtype) for grad in grads)


def _part(keys_values: tuple[Tensor, ...], part: Part, heads: int) -> tuple[Tensor, Tensor]:
    keys = slice(part.kv_start, part.kv_stop)
    key, value = keys_values[2 * part.segment], keys_values[2 * part.segment + 1]
    return expand_heads(key[:, :, keys], heads), expand_heads(value[:, :, keys], heads)


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """The gradient ``(batch, heads, n, d)`` of expanded keys, summed to ``(batch, kv_heads, n, d)``."""
    batch, heads, length, dim = grad.shape
    return grad if heads == kv_heads else grad.reshape(batch, kv_heads, heads // kv_heads, length, dim).sum(2)
