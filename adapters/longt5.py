"""LongT5 (Guo et al. 2022, arXiv:2112.07916): long encoders with relative biases (T5, arXiv:1910.10683).

A token of the encoder sees the tokens at most ``local_radius`` tokens away. In transient-global attention, a token also
sees a second segment. This segment has one key per full block of ``global_block_size`` tokens
(:func:`~attnzoo.adapters.longt5_blocks.find_global_blocks`). The key is a projection of the normalised sum of the
block's tokens. :mod:`attnzoo.adapters.longt5_decoder` describes the decoder's attention.

The first layer of an encoder or decoder computes the learned bias. The later layers get this bias as an argument. In
the original model, the argument is a tensor with one value per score. If all these layers are patched, the argument
is only the ``values`` of a :class:`~attnzoo.spec.bias.RelativeBias`: one value per head and distance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Adapter, Attend, PatchPoint, request_for
from attnzoo.adapters.longt5_bias import (
    SIDE_TABLE,
    TABLE,
    check_buckets,
    local_reach,
    read_local_bias,
    read_side_bias,
    side_reach,
    trains_bias,
    values_by_distance,
)
from attnzoo.adapters.longt5_blocks import (
    MODULE,
    GlobalBlocks,
    Tokens,
    check_is_given,
    find_global_blocks,
    from_blocked,
    read_blocked_mask,
    read_flat_mask,
    sum_blocks,
    to_blocked,
)
from attnzoo.adapters.longt5_decoder import STACK_FINGERPRINTS, DecoderCrossAttention, DecoderSelfAttention
from attnzoo.errors import PatchError
from attnzoo.patching.companions import FeedForwardPoint
from attnzoo.patching.mask_arguments import DECODER_MASKS, ENCODER_MASK, MaskArguments, MaskCheckPoint
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.patterns import Full, Pattern, Window
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest


class StackMasks(MaskCheckPoint):
    """Patch point that checks the masks of the encoder or the decoder."""

    cls = f"{MODULE}:LongT5Stack"

    def masks_of(self, module: Any) -> MaskArguments:
        return DECODER_MASKS if module.is_decoder else {"attention_mask": ENCODER_MASK}


class FeedForward(FeedForwardPoint):
    """Patch point of the feed-forward layer, whose tensors ``(batch, length, d_ff)`` need most of the memory."""

    cls = f"{MODULE}:LongT5LayerFF"
    shared_in = f"{MODULE}:LongT5Block"
    verified = {
        f"{MODULE}:LongT5LayerFF.forward": ("432b21633ac2f248",),
        f"{MODULE}:LongT5LayerNorm.forward": ("81edbc9fcff1f983",),
        f"{MODULE}:LongT5DenseActDense.forward": ("bafc30496281f182",),
        f"{MODULE}:LongT5DenseGatedActDense.forward": ("2587af75f025ee35",),
    }

    def forward(self, module: Any, attend: Attend, hidden_states: Tensor) -> Tensor:
        return super().forward(module, attend, hidden_states)


_ENCODER_FINGERPRINTS = {
    **STACK_FINGERPRINTS,
    f"{MODULE}:_get_local_attention_mask": ("8c3c356dda8b03b3",),
    f"{MODULE}:_mask_local_attention_mask": ("f68cbe2bcbc24544",),
    f"{MODULE}:_make_3block_relative_position_ids": ("7b7c3a25bae46dfd",),
    f"{MODULE}:_concatenate_3_blocks": ("26a6a4dbe78d5c68",),
    f"{MODULE}:_split_into_blocks": ("7615bc05f415e7b9",),
    f"{MODULE}:_pad_to_multiple": ("19198c455e7ba271",),
}


class LocalAttention(PatchPoint):
    """Patch point of the encoder's local attention with a relative bias."""

    cls = f"{MODULE}:LongT5LocalAttention"
    traceable = True
    shared_in = f"{MODULE}:LongT5Stack"
    verified = {
        **_ENCODER_FINGERPRINTS,
        f"{MODULE}:LongT5LocalAttention.forward": ("df95b904490c1634",),
        f"{MODULE}:LongT5LocalAttention.compute_bias": ("4df568a8408a94de",),
        f"{MODULE}:LongT5LocalAttention._relative_position_bucket": ("fdeaabc98f494585",),
        f"{MODULE}:LongT5LayerLocalSelfAttention.forward": ("757d200f2b32f60d",),
    }

    def describe(self, module: Any) -> str:
        return f"window {module.local_radius} + {module.local_radius}, relative bias"

    def requests(self, module: Any) -> tuple[Request, ...]:
        return (_request(module, _window(module)),)

    def trains_bias(self, module: Any) -> bool:
        return trains_bias(module, TABLE)

    def original_serves(
        self, module: Any, hidden_states: Tensor, mask: Any = None, position_bias: Any = None, *args: Any, **kwargs: Any
    ) -> bool:
        # A patched layer passes one value per distance to the later layers. The original needs one value per score.
        return position_bias is None or position_bias.ndim != 2

    def dropout(self, module: Any) -> float:
        return float(module.dropout)

    def check(self, module: Any) -> None:
        if local_reach(module) < 1:
            raise PatchError(f"config.local_radius: got {local_reach(module)}; allowed: an integer >= 1")
        check_buckets(module)

    def forward(
        self,
        module: Any,
        attend: Attend,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Return states ``(batch, length, d_model)``, the bias for the next layers, and the weights if requested."""
        mask = check_is_given(mask)
        tokens = attend.cached_per_forward(
            mask, "tokens", lambda mask: read_blocked_mask(mask, module.block_len, hidden_states)
        )
        passed = values = position_bias
        if position_bias is None and module.has_relative_attention_bias:
            values = values_by_distance(module, TABLE, local_reach(module))
            passed = _bias_to_pass(module, attend, values, hidden_states, mask)
        elif position_bias is not None and position_bias.ndim != 2:
            values = read_local_bias(position_bias, tokens.real, module.block_len)
        segment = _local_segment(module, hidden_states, tokens, values)
        output, weights = _attend(module, attend, hidden_states, (segment,), tokens, output_attentions)
        return (output, passed) if weights is None else (output, passed, weights)


class TransientGlobalAttention(LocalAttention):
    """Patch point of the encoder's local attention with a second segment, which has one key per global block."""

    cls = f"{MODULE}:LongT5TransientGlobalAttention"
    verified = {
        **_ENCODER_FINGERPRINTS,
        f"{MODULE}:LongT5TransientGlobalAttention.forward": ("84fa33fd94ba9fba",),
        f"{MODULE}:LongT5TransientGlobalAttention.compute_bias": ("4df568a8408a94de",),
        f"{MODULE}:LongT5TransientGlobalAttention.compute_side_bias": ("e24c69d133c057bc",),
        f"{MODULE}:LongT5TransientGlobalAttention._relative_position_bucket": ("fdeaabc98f494585",),
        f"{MODULE}:LongT5LayerTransientGlobalSelfAttention.forward": ("a552a2fe934f8d39",),
        f"{MODULE}:_make_global_fixed_block_ids": ("12bdc1a09ee50df2",),
        f"{MODULE}:_make_side_relative_position_ids": ("ed42e5fafb96dbcb",),
        f"{MODULE}:_create_global_aggregates": ("dc970e90563c1643",),
    }

    def describe(self, module: Any) -> str:
        radius, size = module.local_radius, module.global_block_size
        return f"window {radius} + {radius} + a key per {size} tokens, relative biases"

    def requests(self, module: Any) -> tuple[Request, ...]:
        return (_request(module, _window(module), Full()),)

    def original_serves(self, module: Any, *args: Any, **kwargs: Any) -> bool:
        # The original adds up 1 / size in torch's default dtype. Rounding makes block indices wrong, except for powers
        # of two in float32 and float64 (see find_global_blocks).
        size = int(module.global_block_size)
        exact = size & (size - 1) == 0 and torch.get_default_dtype() in (torch.float32, torch.float64)
        return exact and super().original_serves(module, *args, **kwargs)

    def trains_bias(self, module: Any) -> bool:
        return trains_bias(module, TABLE, SIDE_TABLE)

    def forward(
        self,
        module: Any,
        attend: Attend,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Return states, bias and weights as :class:`LocalAttention` does. The bias has the values of both segments."""
        mask = check_is_given(mask)
        tokens = attend.cached_per_forward(mask, "tokens", lambda mask: read_flat_mask(mask, hidden_states))
        size = module.global_block_size  # part of the name below, because two encoders may share a mask
        blocks = attend.cached_per_forward(
            mask, f"blocks of {size} tokens", lambda mask: find_global_blocks(mask, size)
        )
        tables = (TABLE, SIDE_TABLE)[: 2 if blocks.number else 1]
        reaches = (local_reach(module), side_reach(module))[: len(tables)]
        passed = values = position_bias
        if position_bias is None and module.has_relative_attention_bias:
            pairs = zip(tables, reaches, strict=True)
            values = torch.cat([values_by_distance(module, table, reach) for table, reach in pairs], dim=1)
            passed = _bias_to_pass(module, attend, values, hidden_states, mask)
        elif position_bias is not None and position_bias.ndim != 2:
            values = read_local_bias(position_bias, tokens.real, module.block_len)
            if blocks.number:
                side = position_bias[..., 3 * module.block_len :]
                values = torch.cat([values, read_side_bias(side, blocks, module.block_len, reaches[1])], dim=1)
        local_values, *side_values = (
            (None, None) if values is None else values.split([2 * reach + 1 for reach in reaches], dim=1)
        )
        segments = [_local_segment(module, hidden_states, tokens, local_values)]
        sums = module.global_input_layer_norm(sum_blocks(hidden_states, blocks))
        if blocks.number:
            segments.append(_global_segment(module, sums, blocks, side_values[0]))
        output, weights = _attend(module, attend, hidden_states, tuple(segments), tokens, output_attentions)
        if not blocks.number:
            # This adds 0, so that the weight of the layer norm gets a gradient of zeros, as in the original.
            output = output + sums.sum()
        return (output, passed) if weights is None else (output, passed, weights)


def _window(module: Any) -> Window:
    return Window(local_reach(module), local_reach(module))


def _request(module: Any, *patterns: Pattern) -> Request:
    heads = module.n_heads
    segments = [SegmentRequest(pattern, heads, key_mask=True, bias="relative") for pattern in patterns]
    return request_for(module, heads, module.key_value_proj_dim, *segments)


def _local_segment(module: Any, hidden_states: Tensor, tokens: Tokens, values: Tensor | None) -> Segment:
    bias = None if values is None else RelativeBias(values, zero=local_reach(module))
    key, value = (split_heads(project(hidden_states), module.key_value_proj_dim) for project in (module.k, module.v))
    return Segment(key, value, _window(module), key_mask=tokens.mask, bias=bias)


def _global_segment(module: Any, sums: Tensor, blocks: GlobalBlocks, values: Tensor | None) -> Segment:
    key, value = (split_heads(project(sums), module.key_value_proj_dim) for project in (module.k, module.v))
    bias = None if values is None else RelativeBias(values, zero=side_reach(module), positions=blocks.block_of)
    return Segment(key, value, Full(), key_mask=blocks.mask, bias=bias)


def _attend(
    module: Any, attend: Attend, hidden_states: Tensor, segments: tuple[Segment, ...], tokens: Tokens, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Return states ``(batch, length, d_model)`` and, if ``wanted``, weights in the layout of :func:`to_blocked`."""
    query = split_heads(module.q(hidden_states), module.key_value_proj_dim)
    dropout = module.dropout if module.training else 0.0
    result = attend(Attention(query, segments, 1.0, dropout, query_mask=tokens.mask), wanted)  # T5 uses no scale
    if result.dropped is None:
        return module.o(merge_heads(result.output)), None
    blocked, mixed = to_blocked(result.dropped, module.block_len), result.output
    if blocked.requires_grad:  # compute the output from the returned weights, so that these weights get a gradient
        dense = from_blocked(blocked, module.block_len, query.shape[2])
        mixed = dense @ torch.cat([segment.value for segment in segments], dim=2)
    return module.o(merge_heads(mixed)), blocked


def _bias_to_pass(module: Any, attend: Attend, values: Tensor, hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Return the bias for the later layers, in the form that all of them can read.

    This is ``values`` or, if one of these layers may run the original code, the bias tensor of the original code.
    """
    if attend.complete:
        return values
    original: Tensor = type(module).forward(module, hidden_states.detach(), mask)[1]
    return original


LONGT5 = Adapter(
    model_types=("longt5",),
    versions="5.17 to 5.24",
    examples=({"encoder_attention_type": "local"}, {"encoder_attention_type": "transient-global"}),
    points=(
        LocalAttention(),
        TransientGlobalAttention(),
        StackMasks(),
        FeedForward(),
        DecoderSelfAttention(),
        DecoderCrossAttention(),
    ),
)
