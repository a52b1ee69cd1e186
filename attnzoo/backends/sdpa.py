"""``sdpa``: everything on ``torch.nn.functional.scaled_dot_product_attention`` and the kernels behind it.

A dense pattern is one call. A local pattern, or several segments, go in blocks of queries that see only their span of
keys: on the CPU through the FlashAttention kernel and log-sum-exp unions (:mod:`attnzoo.backends.flash_cpu`),
elsewhere, and where dropout or a trained bias is asked for, through one public call per block on concatenated keys.
The kernel is chosen here and then enforced, so that what is reported is what ran.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnzoo.backend import Backend, Capabilities
from attnzoo.backends import flash_cpu
from attnzoo.backends.blocks import Block, Masks, additive, block_size, blocks, sees_all
from attnzoo.backends.eager import expand_heads
from attnzoo.patterns import Causal, Chunks, Full, Window
from attnzoo.segments import FLOATS, Attention, Result


@dataclass(frozen=True)
class SdpaBackend(Backend):
    """Scaled dot-product attention of PyTorch, blocked where the pattern is local."""

    name: ClassVar[str] = "sdpa"
    priority: ClassVar[int] = 10
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset(FLOATS),
        patterns=frozenset({Full, Causal, Window, Chunks}),
        segments=1 << 16,
        key_mask=True,
        mask=True,
        bias=frozenset({"relative", "dense"}),
        bias_grad=True,
        gqa=True,
        uneven_value_dim=True,
        dropout=True,
        grad=True,
    )

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        causal = _is_single_causal(attention)
        if causal or _is_single_whole(attention):
            (segment,) = attention.segments
            seen = None if segment.key_mask is None else segment.key_mask[:, None, None, :]
            return _call(
                attention, attention.query, segment.key, segment.value, seen, None, causal, attention.query_mask
            )
        if _lse_kernel_takes(attention):
            return Result(flash_cpu.attend(attention), flash_cpu.KERNEL)
        # Concatenated keys are copied for every block: larger blocks copy less.
        return _concatenated(attention, min(attention.q_len, 4 * block_size(attention)))


def _is_single_whole(attention: Attention) -> bool:
    """One segment of which every query sees every key but for padding: one call, and no mask beyond a row of keys."""
    segment = attention.segments[0]
    return (
        len(attention.segments) == 1 and segment.mask is None and segment.bias is None and sees_all(attention, segment)
    )


def _is_single_causal(attention: Attention) -> bool:
    """One segment that torch's own ``is_causal`` says exactly; it aligns query 0 with key 0."""
    segment = attention.segments[0]
    return (
        len(attention.segments) == 1
        and isinstance(segment.pattern, Causal)
        and not sees_all(attention, segment)
        and segment.pattern.shift(attention.q_len, segment.kv_len) == 0
        and segment.key_mask is segment.mask is segment.bias is None
    )


def _lse_kernel_takes(attention: Attention) -> bool:
    trained_bias = torch.is_grad_enabled() and any(
        segment.bias is not None and segment.bias.values.requires_grad for segment in attention.segments
    )
    return (
        attention.query.device.type == "cpu"
        and attention.dropout == 0.0
        and not trained_bias
        and attention.value_dim == attention.head_dim
        and flash_cpu.unavailable() is None
    )


def _concatenated(attention: Attention, size: int) -> Result:
    """One call per block on the concatenated keys of all its parts."""
    plan = list(blocks(attention, size))
    masks = Masks(attention)
    pieces = [_Pieces(attention, index, plan) for index in range(len(attention.segments))]
    outputs, kernels = [], set()
    for block, query in zip(plan, attention.query.split(size, dim=2), strict=True):
        if not block.parts:
            outputs.append(query.new_zeros((*query.shape[:3], attention.value_dim)) * query.sum())
            continue
        keys = [pieces[part.segment].key(part.kv_start, part.kv_stop) for part in block.parts]
        values = [pieces[part.segment].value(part.kv_start, part.kv_stop) for part in block.parts]
        seen, bias = _joined_masks(attention, masks, block)
        query_mask = attention.query_mask
        result = _call(
            attention,
            query,
            torch.cat(keys, dim=2),
            torch.cat(values, dim=2),
            seen,
            bias,
            False,
            None if query_mask is None else query_mask[:, block.q_start : block.q_stop],
        )
        outputs.append(result.output)
        kernels.add(result.kernel)
    return Result(torch.cat(outputs, dim=2), "+".join(sorted(kernels)) or "none")


class _Pieces:
    """Keys and values of a segment, cut where any block's span begins or ends.

    A slice per block would give autograd a whole-length gradient per block to add up; pieces that blocks share and
    concatenate have gradients of their own size.
    """

    def __init__(self, attention: Attention, index: int, plan: list[Block]) -> None:
        segment = attention.segments[index]
        parts = [part for block in plan for part in block.parts if part.segment == index]
        self._cuts = sorted({0, segment.kv_len, *(p.kv_start for p in parts), *(p.kv_stop for p in parts)})
        sizes = [stop - start for start, stop in zip(self._cuts, self._cuts[1:], strict=False)]
        self._keys = expand_heads(segment.key, attention.heads).split(sizes, dim=2)
        self._values = expand_heads(segment.value, attention.heads).split(sizes, dim=2)

    def key(self, start: int, stop: int) -> Tensor:
        return torch.cat(self._keys[self._cuts.index(start) : self._cuts.index(stop)], dim=2)

    def value(self, start: int, stop: int) -> Tensor:
        return torch.cat(self._values[self._cuts.index(start) : self._cuts.index(stop)], dim=2)


def _joined_masks(attention: Attention, masks: Masks, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """Mask and bias of all parts of a block side by side."""
    seen = [masks.of(block, part) for part in block.parts]
    bias = [masks.bias(block, part) for part in block.parts]
    shape = (attention.batch, attention.heads, block.q_stop - block.q_start)
    widths = [part.kv_stop - part.kv_start for part in block.parts]
    query = attention.query
    joined_seen = joined_bias = None
    if any(mask is not None for mask in seen):
        heads = max(1 if mask is None else mask.seen.shape[1] for mask in seen)
        joined_seen = torch.cat(
            [
                torch.ones((1, 1, 1, 1), dtype=torch.bool, device=query.device).expand(shape[0], heads, shape[2], width)
                if mask is None
                else mask.seen.expand(shape[0], heads, shape[2], width)
                for mask, width in zip(seen, widths, strict=True)
            ],
            dim=-1,
        )
    if any(term is not None for term in bias):
        joined_bias = torch.cat(
            [
                (query.new_zeros((1, 1, 1, 1)) if term is None else term.to(query.dtype)).expand(*shape, width)
                for term, width in zip(bias, widths, strict=True)
            ],
            dim=-1,
        )
    return joined_seen, joined_bias


def _call(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    query_mask: Tensor | None,
) -> Result:
    """One ``scaled_dot_product_attention``, with rows that see nothing (or are padding) as zeros."""
    live = None
    if seen is not None:
        # Kernels disagree on rows that see nothing. Let such rows see everything, and drop what comes out.
        live = seen.any(-1, keepdim=True)
        seen = (seen | ~live).expand(-1, -1, query.shape[2], -1)
    mask = seen if bias is None else additive(seen, bias, query.dtype)
    key, value = expand_heads(key, attention.heads), expand_heads(value, attention.heads)
    kernel = _kernel(query, key, value, mask, attention.dropout, causal)
    with sdpa_kernel(kernel):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=attention.dropout, is_causal=causal, scale=attention.scale
        )
    if live is not None:
        output = output.masked_fill(~live, 0.0)
    if query_mask is not None:
        output = output.masked_fill(~query_mask[:, None, :, None], 0.0)
    return Result(output, _NAMES[kernel])


_NAMES = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.MATH: "math",
}


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> SDPBackend:
    """The fastest kernel that takes this call."""
    trained_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if query.device.type == "cpu":
        fused = dropout == 0.0 and not trained_mask and query.shape[-1] == value.shape[-1]
        return SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH
    params = torch.backends.cuda.SDPAParams(query, key, value, mask, dropout, causal, False)
    if torch.backends.cuda.can_use_flash_attention(params):
        return SDPBackend.FLASH_ATTENTION
    if torch.backends.cuda.can_use_efficient_attention(params):
        return SDPBackend.EFFICIENT_ATTENTION
    if torch.backends.cuda.can_use_cudnn_attention(params):
        return SDPBackend.CUDNN_ATTENTION
    return SDPBackend.MATH
