"""LED, the Longformer Encoder-Decoder (Beltagy et al. 2020, arXiv:2004.05150).

The encoder attends as Longformer does; the decoder has causal self-attention and cross-attention with caches.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from attnzoo.adapter import Adapter, Attend, PatchPoint, bind_function, parameter_of
from attnzoo.adapters.longformer import VERSIONS, encoder_seam
from attnzoo.adapters.longformer_mask import MaskFunction, mask_seam
from attnzoo.patching.companions import companion
from attnzoo.patching.mask_arguments import CROSS_MASK, DECODER_MASK, TypedMasks, checking
from attnzoo.spec.documents import attend_documents
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.masks import read_attention_mask
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest

_MODULE = "transformers.models.led.modeling_led"
_ENCODER_FORWARD = ("47720093331635f3", "d710ce36e019c88c")


def _decoder_forward(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None, Any]:
    """Self-attention, or cross-attention if ``key_value_states`` are given; ``(batch, length, embed)`` in and out."""
    query = split_heads(module.q_proj(hidden_states), module.head_dim)
    key, value = _keys_values(module, hidden_states, key_value_states, past_key_values)
    cross = key_value_states is not None
    segment, documents = Segment(key.to(query.dtype), value.to(query.dtype), Full(cross)), None
    if attention_mask is not None:
        sizes = (query.shape[0], query.shape[2], key.shape[2])
        read = attend.cached_per_forward(attention_mask, "read", lambda given: read_attention_mask(given, sizes))
        pattern = Full(cross) if isinstance(read.pattern, Full) else read.pattern
        segment = replace(segment, pattern=pattern, key_mask=read.key_mask, mask=read.mask, bias=read.bias)
        documents = read.documents
    dropout = module.dropout if module.training else 0.0
    attention = Attention(query, (segment,), module.scaling, dropout)
    result = attend_documents(attend, attention, documents, output_attentions)
    output = module.out_proj(merge_heads(result.output))
    return output, None if result.probabilities is None else result.probabilities[0], past_key_values


def _keys_values(
    module: Any, hidden_states: Tensor, encoder_states: Tensor | None, cache: Any
) -> tuple[Tensor, Tensor]:
    """Keys and values ``(batch, heads, kv_len, head_dim)``, through the cache if there is one.

    An ``EncoderDecoderCache`` holds one cache for each kind of attention; that of the encoder's states is filled once.
    """
    cross = encoder_states is not None
    filled = getattr(cache, "is_updated", None)
    store = cache
    if filled is not None:
        store = cache.cross_attention_cache if cross else cache.self_attention_cache
        if cross and filled.get(module.layer_idx):
            layer = store.layers[module.layer_idx]
            return layer.keys, layer.values
    source = hidden_states if encoder_states is None else encoder_states
    key, value = (split_heads(project(source), module.head_dim) for project in (module.k_proj, module.v_proj))
    if store is not None:
        key, value = store.update(key, value, module.layer_idx)
        if cross and filled is not None:
            filled[module.layer_idx] = True
    return key, value


def _decoder_requests(module: Any) -> tuple[Request, ...]:
    parameter, heads, dim = parameter_of(module), module.num_heads, module.head_dim
    return tuple(
        Request(
            parameter.device.type, parameter.dtype, heads, dim, dim, (SegmentRequest(pattern, heads, key_mask=True),)
        )
        for pattern in (Full(cross=True), Full(), Causal(offset=0))
    )


def _decoder_masks(module: Any) -> TypedMasks:
    """What a decoder takes, by what users call it: the cross-attention has the model's ``attention_mask``."""
    return {
        "attention_mask": replace(DECODER_MASK, name="decoder_attention_mask"),
        "encoder_attention_mask": replace(CROSS_MASK, name="attention_mask"),
    }


def _one_row(prepare: MaskFunction) -> MaskFunction:
    return partial(prepare, tgt_len=1)


LED = Adapter(
    model_types=("led",),
    versions=VERSIONS,
    points=(
        encoder_seam(
            _MODULE,
            "LEDEncoderSelfAttention",
            {
                "forward": ("6d782e2d0280dde0",),
                "_concat_with_global_key_attn_probs": ("2bd1410c2ba1cc7d",),
                "_compute_global_attn_output_from_hidden": ("c6f95642ee01b416",),
                "LEDEncoder.forward": _ENCODER_FORWARD,
            },
        ),
        mask_seam(
            f"{_MODULE}:LEDEncoder",
            "_prepare_4d_attention_mask_inverted",
            _one_row,
            {
                f"{_MODULE}:LEDEncoder.forward": _ENCODER_FORWARD,
                f"{_MODULE}:_prepare_4d_attention_mask_inverted": ("024fcf92449bc256",),
            },
        ),
        companion(f"{_MODULE}:LEDDecoder", checking(_decoder_masks), {}, "checks masks"),
        PatchPoint(
            cls=f"{_MODULE}:LEDDecoderAttention",
            bind=bind_function(_decoder_forward),
            describe=lambda module: "masked (decoder self or cross)",
            requests=_decoder_requests,
            dropout=lambda module: float(module.dropout),
            verified={
                f"{_MODULE}:LEDDecoderAttention.forward": ("3eb1956ac64b70a7",),
                f"{_MODULE}:LEDDecoder.forward": ("4797df659fe32543", "efe619d6f6d3eef9"),
            },
        ),
    ),
)
