"""LongT5 (Guo et al. 2022, arXiv:2112.07916): long encoders with relative biases (T5, arXiv:1910.10683).

A token of the encoder looks at the tokens within ``local_radius``. With transient-global attention it looks at one more
segment: a key per full block of ``global_block_size`` tokens, projected from the block's sum. The decoder has T5's
causal self-attention and cross-attention (:mod:`attnzoo.adapters.longt5_decoder`).

The first layer of a stack computes the learned bias, and the stack passes it on to the others. The model passes on what
is added to its scores; here it is the ``(heads, R)`` values of a :class:`~attnzoo.spec.bias.RelativeBias`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.adapter import Adapter, Attend, PatchPoint, bind_function
from attnzoo.adapters.longt5_bias import (
    Globals,
    bucketed,
    check_buckets,
    local_reach,
    read_local,
    read_side,
    side_reach,
    trains_bias,
)
from attnzoo.adapters.longt5_decoder import bind_decoder, check_decoder, decoder_requests, request
from attnzoo.errors import InvalidArgumentError, PatchError
from attnzoo.patching.companions import by_slices, companion
from attnzoo.patching.mask_arguments import CROSS_MASK, DECODER_MASK, ENCODER_MASK, TypedMasks, checking
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.patterns import Full, Pattern, Window
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest, describe
from attnzoo.spec.transforms import holds, readable

_MODULE = "transformers.models.longt5.modeling_longt5"
VERSIONS = "5.17 to 5.23"
_TABLE, _SIDE_TABLE = "relative_attention_bias", "global_relative_attention_bias"


class _Tokens(NamedTuple):
    """Which tokens are real: ``(batch, length)`` bool, and the same as a mask: None if there is no padding."""

    real: Tensor
    mask: Tensor | None


def _tokens(real: Tensor) -> _Tokens:
    return _Tokens(real, None if holds(real.all(), unknown=False) else real)


def _window(module: Any) -> Window:
    radius = local_reach(module)
    return Window(radius, radius)


def _dropout(module: Any) -> float:
    return float(module.dropout)


# --- the encoder, local


def _local_forward(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor | None, ...]:
    """The module's forward: ``(batch, length, d_model)`` in and out, with the shared bias and weights if asked for."""
    mask = _given(mask)
    tokens = attend.cached_per_forward(
        mask, "tokens", lambda mask: _tokens(_read_blocked(mask, module.block_len, hidden_states))
    )
    passed, values = position_bias, position_bias
    if position_bias is None and module.has_relative_attention_bias:
        values = bucketed(module, _TABLE, local_reach(module))
        passed = _pass_on(module, attend, values, hidden_states, mask)
    elif position_bias is not None and position_bias.ndim != 2:
        values = read_local(position_bias, tokens.real, module.block_len)
    segment = _local_segment(module, hidden_states, tokens, values)
    output, weights = _attend(module, attend, hidden_states, (segment,), tokens, output_attentions)
    return (output, passed) if weights is None else (output, passed, weights)


def _local_segment(module: Any, hidden_states: Tensor, tokens: _Tokens, values: Tensor | None) -> Segment:
    bias = None if values is None else RelativeBias(values, zero=local_reach(module))
    key, value = (split_heads(project(hidden_states), module.key_value_proj_dim) for project in (module.k, module.v))
    return Segment(key, value, _window(module), key_mask=tokens.mask, bias=bias)


def _attend(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    segments: tuple[Segment, ...],
    tokens: _Tokens,
    probabilities: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output ``(batch, length, d_model)``, and blocked weights if asked for. T5 does not scale its scores."""
    query = split_heads(module.q(hidden_states), module.key_value_proj_dim)
    dropout = module.dropout if module.training else 0.0
    result = attend(Attention(query, segments, 1.0, dropout, query_mask=tokens.mask), probabilities)
    if result.dropped is None:
        return module.o(merge_heads(result.output)), None
    blocked, mixed = _blocked(result.dropped, module.block_len), result.output
    if blocked.requires_grad:  # the output is computed from the weights that are returned, so that they get a gradient
        dense = torch.cat(_unblocked(blocked, module.block_len, query.shape[2]), dim=-1)
        mixed = dense @ torch.cat([segment.value for segment in segments], dim=2)
    return module.o(merge_heads(mixed)), blocked


def _pass_on(module: Any, attend: Attend, values: Tensor, hidden_states: Tensor, mask: Tensor) -> Tensor:
    """What the stack hands to its other layers: the values; what the model itself does where some run its own code."""
    if attend.complete:
        return values
    native: Tensor = type(module).forward(module, hidden_states.detach(), mask)[1]
    return native


def _given(mask: Tensor | None) -> Tensor:
    """The mask; without one the model's own code does not even keep to the window, and no stack calls it so."""
    if not isinstance(mask, Tensor):
        raise InvalidArgumentError("mask", describe(mask), "the mask that the model's stack makes")
    return mask


def _read_blocked(mask: Tensor, block_len: int, hidden_states: Tensor) -> Tensor:
    """Which tokens are real ``(batch, length)``, from who sees whom ``(batch, 1, blocks, block_len, 3 * block_len)``.

    A token sees itself if it is real. The rest of the mask must follow from that.
    """
    batch, length = hidden_states.shape[:2]
    blocks = -(-length // block_len)
    shape = (batch, 1, blocks, block_len, 3 * block_len)
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise InvalidArgumentError("mask", describe(mask), f"bool {shape}, as the model's stack makes it")
    real = mask[:, 0].diagonal(block_len, -2, -1)
    keys = torch.nn.functional.pad(real.flatten(1), (block_len, block_len)).unfold(1, 3 * block_len, block_len)
    position = torch.arange(3 * block_len, device=mask.device)
    near = (position - position[block_len : 2 * block_len, None]).abs() < block_len
    if readable(mask) and not torch.equal(real[..., None] & keys[:, :, None] & near, mask[:, 0]):
        raise InvalidArgumentError("mask", "one that is not made of padding", "the mask that the model's stack makes")
    return real.flatten(1)[:, :length]


def _blocked(weights: tuple[Tensor, ...], block_len: int) -> Tensor:
    """Dense weights per segment in the model's layout: ``(batch, blocks, heads, block_len, 3 * block_len + globals)``.

    Column ``block_len + k`` of a block is its own token ``k``; the blocks beside it lie to its left and right.
    """
    pad = torch.nn.functional.pad
    length = weights[0].shape[2]
    orphans = -length % block_len
    rows = [pad(part, (0, 0, 0, orphans)).unflatten(2, (-1, block_len)) for part in weights]
    local = pad(rows[0], (block_len, block_len + orphans)).unfold(-1, 3 * block_len, block_len)
    # (batch, heads, blocks of rows, block_len, blocks of columns, 3 * block_len): those of equal number
    local = local.diagonal(0, 2, 4).permute(0, 1, 4, 2, 3)
    return torch.cat([local, *rows[1:]], dim=-1).transpose(1, 2)


def _unblocked(blocked: Tensor, block_len: int, length: int) -> tuple[Tensor, Tensor]:
    """What :func:`_blocked` was made of: dense weights ``(batch, heads, length, length)`` and ``(..., globals)``."""
    rows = blocked.transpose(1, 2)  # (batch, heads, blocks, block_len, 3 * block_len + globals)
    batch, heads, blocks = rows.shape[:3]
    local, rest = rows.split([3 * block_len, rows.shape[4] - 3 * block_len], dim=-1)
    columns = torch.arange(3 * block_len, device=blocked.device) + block_len * torch.arange(
        blocks, device=blocked.device
    ).view(-1, 1, 1)
    wide = local.new_zeros((batch, heads, blocks, block_len, (blocks + 2) * block_len))
    dense = wide.scatter(4, columns.expand_as(local), local).flatten(2, 3)
    return dense[:, :, :length, block_len : block_len + length], rest.flatten(2, 3)[:, :, :length]


# --- the encoder, transient-global


def _transient_forward(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor | None, ...]:
    """As :func:`_local_forward`, with a second segment. The values of both biases are passed on side by side."""
    mask = _given(mask)
    tokens = attend.cached_per_forward(mask, "tokens", lambda mask: _tokens(_read_flat(mask, hidden_states)))
    size = module.global_block_size  # encoders that are given the same mask need not have blocks of the same size
    blocks = attend.cached_per_forward(mask, f"globals of {size} tokens", lambda mask: _globals(mask, size))
    tables = (_TABLE, _SIDE_TABLE)[: 2 if blocks.number else 1]
    reaches = (local_reach(module), side_reach(module))[: len(tables)]
    passed, values = position_bias, position_bias
    if position_bias is None and module.has_relative_attention_bias:
        pairs = zip(tables, reaches, strict=True)
        values = torch.cat([bucketed(module, table, reach) for table, reach in pairs], dim=1)
        passed = _pass_on(module, attend, values, hidden_states, mask)
    elif position_bias is not None and position_bias.ndim != 2:
        values = read_local(position_bias, tokens.real, module.block_len)
        if blocks.number:
            side = read_side(position_bias[..., 3 * module.block_len :], blocks, module.block_len, reaches[1])
            values = torch.cat([values, side], dim=1)
    biases = (None, None) if values is None else values.split([2 * reach + 1 for reach in reaches], dim=1)
    segments = [_local_segment(module, hidden_states, tokens, biases[0])]
    sums = module.global_input_layer_norm(_aggregate(hidden_states, blocks))
    if blocks.number:
        key, value = (split_heads(project(sums), module.key_value_proj_dim) for project in (module.k, module.v))
        bias = None if biases[1] is None else RelativeBias(biases[1], zero=reaches[1], positions=blocks.of)
        segments.append(Segment(key, value, key_mask=blocks.mask, bias=bias))
    output, weights = _attend(module, attend, hidden_states, tuple(segments), tokens, output_attentions)
    if not blocks.number:
        output = output + sums.sum()  # of nothing: 0. The norm's weight gets a gradient of zeros, as in the model
    return (output, passed) if weights is None else (output, passed, weights)


def _read_flat(mask: Tensor, hidden_states: Tensor) -> Tensor:
    shape = tuple(hidden_states.shape[:2])
    if not mask.dtype.is_signed:  # the model's own code numbers padding -1
        raise InvalidArgumentError("attention_mask", describe(mask), "a dtype with negative numbers, e.g. torch.long")
    if tuple(mask.shape) != shape or not holds(((mask == 0) | (mask == 1)).all(), unknown=True):
        raise InvalidArgumentError("attention_mask", describe(mask), f"{shape} of ones (tokens) and zeros (padding)")
    return mask != 0


def _globals(mask: Tensor, size: int) -> Globals:
    """Blocks of ``size`` tokens by position; tokens behind the last block whose end is real join the last full one.

    The model's own code adds up ``1 / size`` in torch's default dtype to number blocks, and goes wrong where these sums
    are rounded: in bfloat16 from token 256 on, and in float32 at the ends of some blocks where the size is no power of
    two. The numbers here are those of exact sums.
    """
    real, position = mask != 0, torch.arange(mask.shape[1], device=mask.device)
    full = (real & (position % size == size - 1)).sum(1, keepdim=True)
    of = torch.minimum(position // size, full - 1).masked_fill(~real, -1)
    exists = torch.arange(mask.shape[1] // size, device=mask.device) <= of.amax(1, keepdim=True)
    return Globals(of, exists, None if holds(exists.all(), unknown=False) else exists)


def _aggregate(hidden_states: Tensor, blocks: Globals) -> Tensor:
    """The sum of each block's tokens, ``(batch, blocks, d_model)``, added up in float32 at least."""
    batch, _, width = hidden_states.shape
    states = hidden_states.float() if hidden_states.dtype in (torch.bfloat16, torch.float16) else hidden_states
    sample = torch.arange(batch, device=states.device)[:, None].expand_as(blocks.of)
    block = torch.where(blocks.of < 0, blocks.number, blocks.of)  # padding goes to one more block, which is dropped
    sums = states.new_zeros((batch, blocks.number + 1, width)).index_put((sample, block), states, accumulate=True)
    return sums[:, : blocks.number].to(hidden_states.dtype)


# --- points


def _requests(module: Any, *patterns: Pattern) -> tuple[Request, ...]:
    heads = module.n_heads
    segments = (SegmentRequest(pattern, heads, key_mask=True, bias="relative") for pattern in patterns)
    return request(module, *segments)


def _local_requests(module: Any) -> tuple[Request, ...]:
    return _requests(module, _window(module))


def _transient_requests(module: Any) -> tuple[Request, ...]:
    return _requests(module, _window(module), Full())


def _check_encoder(module: Any) -> None:
    if local_reach(module) < 1:
        raise PatchError(f"config.local_radius: got {local_reach(module)}; allowed: 1 or more")
    check_buckets(module)


# Fingerprints of what each point relies on: whoever calls it, and whatever it calls or does in the model's place.
_STACK: dict[str, tuple[str, ...]] = {
    "LongT5Stack.forward": ("500d61b6a9e97b7d",),
    "LongT5Block.forward": ("fc0a577f7b4979e7",),
}
_ENCODER: dict[str, tuple[str, ...]] = {
    **_STACK,
    "_get_local_attention_mask": ("8c3c356dda8b03b3",),
    "_mask_local_attention_mask": ("f68cbe2bcbc24544",),
    "_make_3block_relative_position_ids": ("7b7c3a25bae46dfd",),
    "_concatenate_3_blocks": ("26a6a4dbe78d5c68",),
    "_split_into_blocks": ("7615bc05f415e7b9",),
    "_pad_to_multiple": ("19198c455e7ba271",),
}
_LOCAL: dict[str, tuple[str, ...]] = {
    **_ENCODER,
    "LongT5LocalAttention.forward": ("df95b904490c1634",),
    "LongT5LocalAttention.compute_bias": ("4df568a8408a94de",),
    "LongT5LocalAttention._relative_position_bucket": ("fdeaabc98f494585",),
    "LongT5LayerLocalSelfAttention.forward": ("757d200f2b32f60d",),
}
_TRANSIENT: dict[str, tuple[str, ...]] = {
    **_ENCODER,
    "LongT5TransientGlobalAttention.forward": ("84fa33fd94ba9fba",),
    "LongT5TransientGlobalAttention.compute_bias": ("4df568a8408a94de",),
    "LongT5TransientGlobalAttention.compute_side_bias": ("e24c69d133c057bc",),
    "LongT5TransientGlobalAttention._relative_position_bucket": ("fdeaabc98f494585",),
    "LongT5LayerTransientGlobalSelfAttention.forward": ("a552a2fe934f8d39",),
    "_make_global_fixed_block_ids": ("12bdc1a09ee50df2",),
    "_make_side_relative_position_ids": ("ed42e5fafb96dbcb",),
    "_create_global_aggregates": ("dc970e90563c1643",),
}
_DECODER: dict[str, tuple[str, ...]] = {
    **_STACK,
    "LongT5Attention.forward": ("bc4d27e2ffcb970f",),
    "LongT5Attention.compute_bias": ("0ffa4b1ad6bfc683",),
    "LongT5Attention._relative_position_bucket": ("fdeaabc98f494585",),
    "LongT5LayerSelfAttention.forward": ("e6450811d6dcddc9",),
    "LongT5LayerCrossAttention.forward": ("56937a3257c398b4",),
    "eager_attention_forward": ("cbe822ba4dc3de42",),
}


_OWNER = f"{_MODULE}:LongT5Stack"


def _feed_forward(module: Any, attend: Attend, hidden_states: Tensor) -> Tensor:
    """Slice by slice: gated GELU holds four ``(batch, length, d_ff)`` tensors at once, most of what a model needs."""
    return by_slices(module, attend, hidden_states)


def _verified(prints: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {f"{_MODULE}:{name}": known for name, known in prints.items()}


def _decoder_seam(pattern: str, when: Callable[[Any], bool]) -> PatchPoint:
    return PatchPoint(
        cls=f"{_MODULE}:LongT5Attention",
        when=when,
        bind=bind_decoder,
        describe=lambda module: pattern,
        requests=decoder_requests,
        trains_bias=lambda module: trains_bias(module, _TABLE),
        dropout=_dropout,
        check=check_decoder,
        verified=_verified(_DECODER),
        shared_in=_OWNER,
    )


def _masks(module: Any) -> TypedMasks:
    """What a stack takes, by what users call it: the decoder's cross-attention has the model's ``attention_mask``."""
    if not module.is_decoder:
        return {"attention_mask": ENCODER_MASK}
    return {
        "attention_mask": replace(DECODER_MASK, name="decoder_attention_mask"),
        "encoder_attention_mask": replace(CROSS_MASK, name="attention_mask"),
    }


LONGT5 = Adapter(
    model_types=("longt5",),
    versions=VERSIONS,
    examples=({"encoder_attention_type": "local"}, {"encoder_attention_type": "transient-global"}),
    points=(
        PatchPoint(
            cls=f"{_MODULE}:LongT5LocalAttention",
            bind=bind_function(_local_forward),
            describe=lambda module: f"window {module.local_radius} + {module.local_radius}, relative bias",
            requests=_local_requests,
            trains_bias=lambda module: trains_bias(module, _TABLE),
            dropout=_dropout,
            check=_check_encoder,
            verified=_verified(_LOCAL),
            shared_in=_OWNER,
        ),
        PatchPoint(
            cls=f"{_MODULE}:LongT5TransientGlobalAttention",
            bind=bind_function(_transient_forward),
            describe=lambda module: (
                f"window {module.local_radius} + {module.local_radius} + a key per {module.global_block_size} tokens, "
                "relative biases"
            ),
            requests=_transient_requests,
            trains_bias=lambda module: trains_bias(module, _TABLE, _SIDE_TABLE),
            dropout=_dropout,
            check=_check_encoder,
            verified=_verified(_TRANSIENT),
            shared_in=_OWNER,
        ),
        companion(_OWNER, checking(_masks), {}, "checks masks"),
        companion(
            f"{_MODULE}:LongT5LayerFF",
            bind_function(_feed_forward),
            _verified(
                {
                    "LongT5LayerFF.forward": ("432b21633ac2f248",),
                    "LongT5LayerNorm.forward": ("81edbc9fcff1f983",),
                    "LongT5DenseActDense.forward": ("bafc30496281f182",),
                    "LongT5DenseGatedActDense.forward": ("2587af75f025ee35",),
                }
            ),
            "feeds forward slice by slice",
            shared_in=f"{_MODULE}:LongT5Block",
        ),
        _decoder_seam("masked, relative bias", lambda module: bool(module.is_causal)),
        _decoder_seam("masked (cross)", lambda module: not module.is_causal),
    ),
)
