"""Longformer: sliding windows and per-sample global tokens (Beltagy et al. 2020, arXiv:2004.05150).

Ordinary tokens look at two segments: a window without the global tokens, and the global tokens of their sample.
Global tokens look at everything, through projections of their own. LED's encoder is the same attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Adapter, Attend, PatchPoint, bind_function, parameter_of
from attnzoo.adapters.longformer_mask import MaskFunction, mask_seam
from attnzoo.errors import InvalidArgumentError
from attnzoo.patching.mask_arguments import check_mask, refuse_nan
from attnzoo.spec.global_keys import find_global_keys
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.patterns import Full, Window
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest, describe
from attnzoo.spec.transforms import holds, readable

VERSIONS = "5.17 to 5.23"


def _window(module: Any) -> Window:
    return Window(module.one_sided_attn_window_size, module.one_sided_attn_window_size)


def _dropout(module: Any) -> float:
    return float(module.dropout)


def _flags(name: str, given: Tensor, *like: Any) -> Tensor:
    """Checked flags of tokens, of bool."""
    flags = check_mask(name, given, *like)
    if flags.dtype != torch.bool:
        raise InvalidArgumentError(name, describe(flags), "bool")
    return flags


def _real(is_index_masked: Tensor) -> Tensor | None:
    return ~is_index_masked if holds(is_index_masked.any(), unknown=True) else None


def _ordinary(attention_mask: Tensor) -> Tensor:
    """Keys for the window: neither padding (negative) nor global (positive)."""
    refuse_nan("attention_mask", attention_mask)
    return attention_mask == 0


def _forward(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    attention_mask: Tensor,
    is_index_masked: Tensor,
    is_index_global_attn: Tensor,
    is_global_attn: bool,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    """The module's forward: ``(batch, length, embed)`` in and out, with probabilities if asked for.

    ``attention_mask`` ``(batch, length)`` is negative for padding, positive for global tokens, else 0.
    """
    if is_global_attn and not readable(is_index_global_attn):  # how many there are decides on shapes
        got = f"one per sample of vmap, {describe(is_index_global_attn)}"
        raise InvalidArgumentError("is_index_global_attn", got, "one for all samples that vmap maps over")
    dropout = module.dropout if module.training else 0.0
    scale = module.head_dim**-0.5
    like = (*hidden_states.shape[:2], hidden_states.device)
    attention_mask = check_mask("attention_mask", attention_mask, *like)
    is_index_masked = _flags("is_index_masked", is_index_masked, *like)
    is_index_global_attn = _flags("is_index_global_attn", is_index_global_attn, *like)
    ordinary = attend.cached_per_forward(attention_mask, "ordinary", _ordinary)
    real = attend.cached_per_forward(is_index_masked, "real", _real)
    found = attend.cached_per_forward(is_index_global_attn, "globals", find_global_keys) if is_global_attn else None

    query = split_heads(module.query(hidden_states), module.head_dim)
    key = split_heads(module.key(hidden_states), module.head_dim)
    value = split_heads(module.value(hidden_states), module.head_dim)
    segments = [Segment(key, value, _window(module), key_mask=real if found is None else ordinary)]
    if found is not None:
        segments.append(Segment(found.take(key), found.take(value), key_mask=found.valid))
    local = attend(Attention(query, tuple(segments), scale, dropout, query_mask=real), output_attentions)
    output = merge_heads(local.output)
    if found is None:
        if local.dropped is None:
            return (output,)
        return output, _banded(local.dropped, module.one_sided_attn_window_size, None)

    states = hidden_states.gather(1, found.positions[:, :, None].expand(-1, -1, hidden_states.shape[2]))
    # Filler is zero, as in the model: a layer that quantises its input goes by the largest number in it.
    states = states.masked_fill(~found.valid[:, :, None], 0.0)
    query = split_heads(module.query_global(states), module.head_dim)
    everything = Segment(
        split_heads(module.key_global(hidden_states), module.head_dim),
        split_heads(module.value_global(hidden_states), module.head_dim),
        key_mask=real,
    )
    result = attend(Attention(query, (everything,), scale, dropout, query_mask=found.valid), output_attentions)
    sample, number = attend.cached_per_forward(
        is_index_global_attn, "places", lambda _: found.valid.nonzero(as_tuple=True)
    )
    rows = merge_heads(result.output)[sample, number].to(output.dtype)
    places = (sample, found.positions[sample, number])
    # What a backward needs of the output must stay; otherwise copying it would be all that writing a few rows costs.
    output = output.index_put(places, rows) if torch.is_grad_enabled() else output.index_put_(places, rows)
    if local.dropped is None or result.dropped is None:
        return (output,)
    return output, _banded(local.dropped, module.one_sided_attn_window_size, is_index_global_attn), result.dropped[0]


def _banded(weights: tuple[Tensor, ...], window: int, is_global: Tensor | None) -> Tensor:
    """Dense weights per segment in the layout the model returns: ``(batch, length, heads, globals + 2 * window + 1)``.

    Column ``globals + window + d`` is the key ``d`` tokens after the query; rows of global tokens are zero.
    """
    local = torch.nn.functional.pad(weights[0], (window, window))  # key k sits in column k + window
    length, width = local.shape[2], 2 * window + 1
    columns = torch.arange(length, device=local.device)[:, None] + torch.arange(width, device=local.device)
    band = local.gather(3, columns.expand(*local.shape[:2], -1, -1))
    whole = torch.cat([*weights[1:], band], dim=-1).transpose(1, 2)
    return whole if is_global is None else whole.masked_fill(is_global[:, :, None, None], 0.0)


def _requests(module: Any) -> tuple[Request, ...]:
    parameter, heads = parameter_of(module), module.num_heads

    def request(*segments: SegmentRequest) -> Request:
        sizes = (heads, module.head_dim, module.head_dim)
        return Request(parameter.device.type, parameter.dtype, *sizes, segments)

    everything = SegmentRequest(Full(), heads, key_mask=True)
    return request(SegmentRequest(_window(module), heads, key_mask=True), everything), request(everything)


def _describe(module: Any) -> str:
    return f"window {2 * module.one_sided_attn_window_size} + global keys"


def encoder_seam(module: str, cls: str, verified: dict[str, tuple[str, ...]]) -> PatchPoint:
    """The point of a Longformer-like self-attention.

    Args:
        module: the modelling module.
        cls: the attention class in it.
        verified: fingerprints by method: of ``cls``, or ``"Class.method"`` for whoever builds the masks it reads.
    """
    return PatchPoint(
        cls=f"{module}:{cls}",
        bind=bind_function(_forward),
        describe=_describe,
        requests=_requests,
        dropout=_dropout,
        verified={f"{module}:{name if '.' in name else f'{cls}.{name}'}": prints for name, prints in verified.items()},
    )


_MODULE = "transformers.models.longformer.modeling_longformer"


def _one_row(create: MaskFunction) -> MaskFunction:
    """``create_bidirectional_mask`` of transformers for one query instead of as many as there are keys."""

    def create_one_row(inputs_embeds: Tensor, **kwargs: Any) -> Tensor:
        mask: Tensor = create(inputs_embeds=inputs_embeds[:, :1], encoder_hidden_states=inputs_embeds, **kwargs)
        return mask

    return create_one_row


LONGFORMER = Adapter(
    model_types=("longformer",),
    versions=VERSIONS,
    points=(
        encoder_seam(
            _MODULE,
            "LongformerSelfAttention",
            {
                "forward": ("6d782e2d0280dde0",),
                "_concat_with_global_key_attn_probs": ("2bd1410c2ba1cc7d",),
                "_compute_global_attn_output_from_hidden": ("c6f95642ee01b416",),
                "LongformerEncoder.forward": ("7912f2f28477b3eb",),
            },
        ),
        mask_seam(
            f"{_MODULE}:LongformerModel",
            "create_bidirectional_mask",
            _one_row,
            {f"{_MODULE}:LongformerModel.forward": ("2df9dae463217103",)},
        ),
    ),
)
