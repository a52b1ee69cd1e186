"""Longformer: sliding windows, and global tokens in each sample (Beltagy et al. 2020, arXiv:2004.05150).

An ordinary token sees two segments: the ordinary tokens in its window, and the global tokens of its sample. A global
token sees all tokens of its sample, and has separate projections. LED's encoder also uses Longformer's attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Adapter, Attend, PatchPoint, request_for
from attnzoo.adapters.longformer_mask import MaskFunction, OneRowMaskPoint
from attnzoo.errors import InvalidArgumentError
from attnzoo.patching.mask_arguments import check_mask, refuse_nan
from attnzoo.spec.global_keys import find_global_keys
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.patterns import Full, Window
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest, describe
from attnzoo.spec.transforms import hides_nothing, readable, readable_at_once

VERSIONS = "5.17 to 5.24"
_MODULE = "transformers.models.longformer.modeling_longformer"


class ModelMasks(OneRowMaskPoint):
    """Patch point of the model. The patched model builds a padding mask with only one row."""

    cls = f"{_MODULE}:LongformerModel"
    verified = {
        f"{_MODULE}:LongformerModel.forward": ("2df9dae463217103",),
        f"{_MODULE}:create_bidirectional_mask": (
            "21cf7b64660dea02",
            "1f3f24e3033b175c",
            "35ec0d365bf09c96",
            "b8a7ea73442cc912",
        ),
    }
    mask_function = "create_bidirectional_mask"

    def one_row(self, make: MaskFunction) -> MaskFunction:
        def make_one_row(inputs_embeds: Tensor, **kwargs: Any) -> Tensor:
            # ``make`` reads the number of queries from the first argument, and the number of keys from the second.
            mask: Tensor = make(inputs_embeds=inputs_embeds[:, :1], encoder_hidden_states=inputs_embeds, **kwargs)
            return mask

        return make_one_row


class LongformerAttention(PatchPoint):
    """Patch point of window attention with global tokens."""

    cls = f"{_MODULE}:LongformerSelfAttention"
    verified = {
        f"{_MODULE}:LongformerSelfAttention.forward": ("6d782e2d0280dde0",),
        f"{_MODULE}:LongformerSelfAttention._concat_with_global_key_attn_probs": ("2bd1410c2ba1cc7d",),
        f"{_MODULE}:LongformerSelfAttention._compute_global_attn_output_from_hidden": ("c6f95642ee01b416",),
        f"{_MODULE}:LongformerEncoder.forward": ("7912f2f28477b3eb",),
    }

    def describe(self, module: Any) -> str:
        return f"window {2 * module.one_sided_attn_window_size} + global keys"

    def requests(self, module: Any) -> tuple[Request, ...]:
        heads, dim = module.num_heads, module.head_dim
        window, full = (SegmentRequest(pattern, heads, key_mask=True) for pattern in (_window(module), Full()))
        return request_for(module, heads, dim, window, full), request_for(module, heads, dim, full)

    def original_serves(self, module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> bool:
        # The models pad their inputs to this multiple. The original raises for other lengths, a patch computes them.
        return bool(hidden_states.shape[1] % (2 * module.one_sided_attn_window_size) == 0)

    def dropout(self, module: Any) -> float:
        return float(module.dropout)

    def forward(
        self,
        module: Any,
        attend: Attend,
        hidden_states: Tensor,
        attention_mask: Tensor,
        is_index_masked: Tensor,
        is_index_global_attn: Tensor,
        is_global_attn: bool,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return states ``(batch, length, embed)`` and, if requested, the weights of ordinary and global queries.

        ``attention_mask`` ``(batch, length)`` is negative for padding, positive for global tokens, and otherwise 0.
        """
        if is_global_attn and not readable(is_index_global_attn):  # the number of global tokens is a tensor size
            got = f"{describe(is_index_global_attn)}, which vmap maps over"
            raise InvalidArgumentError("is_index_global_attn", got, "a tensor with in_dims=None in vmap")
        dropout, scale = module.dropout if module.training else 0.0, module.head_dim**-0.5
        like = (*hidden_states.shape[:2], hidden_states.device)
        attention_mask = check_mask("attention_mask", attention_mask, *like)
        is_index_masked = _check_flags("is_index_masked", is_index_masked, *like)
        is_index_global_attn = _check_flags("is_index_global_attn", is_index_global_attn, *like)
        once = attend.cached_per_forward
        ordinary = once(attention_mask, "ordinary", _ordinary)
        real = once(is_index_masked, "real", _real)
        global_keys = once(is_index_global_attn, "globals", find_global_keys) if is_global_attn else None

        query = split_heads(module.query(hidden_states), module.head_dim)
        key = split_heads(module.key(hidden_states), module.head_dim)
        value = split_heads(module.value(hidden_states), module.head_dim)
        segments = [Segment(key, value, _window(module), key_mask=real if global_keys is None else ordinary)]
        if global_keys is not None:
            segments.append(Segment(global_keys.take(key), global_keys.take(value), key_mask=global_keys.valid))
        local = attend(Attention(query, tuple(segments), scale, dropout, query_mask=real), output_attentions)
        output = merge_heads(local.output)
        if global_keys is None:
            if local.dropped is None:
                return (output,)
            return output, _banded(local.dropped, module.one_sided_attn_window_size, None)

        positions, valid = global_keys.positions, global_keys.valid
        states = hidden_states.gather(1, positions[:, :, None].expand(-1, -1, hidden_states.shape[2]))
        # Samples with fewer global tokens get rows of 0, as in the model. Quantising layers scale by the largest value.
        states = states.masked_fill(~valid[:, :, None], 0.0)
        query = split_heads(module.query_global(states), module.head_dim)
        key = split_heads(module.key_global(hidden_states), module.head_dim)
        value = split_heads(module.value_global(hidden_states), module.head_dim)
        full = Segment(key, value, key_mask=real)
        result = attend(Attention(query, (full,), scale, dropout, query_mask=valid), output_attentions)
        index = positions[:, :, None].expand(-1, -1, output.shape[2])
        # The places of samples with fewer global tokens keep their rows. Selecting them instead would need a tensor
        # whose size depends on values, for which the host waits.
        rows = torch.where(valid[:, :, None], merge_heads(result.output).to(output.dtype), output.gather(1, index))
        # With gradients, a backward may need the unchanged output. Without gradients, an in-place write avoids a copy.
        output = output.scatter(1, index, rows) if torch.is_grad_enabled() else output.scatter_(1, index, rows)
        if local.dropped is None or result.dropped is None:
            return (output,)
        weights = _banded(local.dropped, module.one_sided_attn_window_size, is_index_global_attn)
        return output, weights, result.dropped[0]


def _window(module: Any) -> Window:
    return Window(module.one_sided_attn_window_size, module.one_sided_attn_window_size)


def _check_flags(name: str, given: Tensor, *like: Any) -> Tensor:
    flags = check_mask(name, given, *like)
    if flags.dtype != torch.bool:
        raise InvalidArgumentError(name, describe(flags), "a bool tensor")
    return flags


def _real(is_index_masked: Tensor) -> Tensor | None:
    visible = ~is_index_masked
    return None if hides_nothing(visible) else visible


def _ordinary(attention_mask: Tensor) -> Tensor:
    """Return a bool mask that is True for ordinary tokens, which have the value 0 in ``attention_mask``."""
    if readable_at_once(attention_mask):  # the model makes this mask; ``ModelMasks`` has read the user's mask
        refuse_nan("attention_mask", attention_mask)
    return attention_mask == 0


def _banded(weights: tuple[Tensor, ...], window: int, is_global: Tensor | None) -> Tensor:
    """Convert dense weights to the model's layout ``(batch, length, heads, globals + 2 * window + 1)``.

    ``weights`` has one tensor per segment. ``globals`` is the number of global keys, which have the first columns of
    the result. Column ``globals + window + d`` has the weight of the key ``d`` tokens after the query. The rows of
    global queries (``is_global``) are 0.
    """
    local = torch.nn.functional.pad(weights[0], (window, window))  # key k is in column k + window
    length, width = local.shape[2], 2 * window + 1
    columns = torch.arange(length, device=local.device)[:, None] + torch.arange(width, device=local.device)
    band = local.gather(3, columns.expand(*local.shape[:2], -1, -1))
    whole = torch.cat([*weights[1:], band], dim=-1).transpose(1, 2)
    return whole if is_global is None else whole.masked_fill(is_global[:, :, None, None], 0.0)


LONGFORMER = Adapter(model_types=("longformer",), versions=VERSIONS, points=(LongformerAttention(), ModelMasks()))
