"""LED, the Longformer Encoder-Decoder (Beltagy et al. 2020, arXiv:2004.05150).

The encoder uses Longformer's attention. The decoder uses causal self-attention and cross-attention, both with caches.
If a call with a cache has only one new token, the original decoder applies no mask, and neither does the patch. So the
new token sees the cached keys of padding tokens. The values of these keys differ from the original: if a padding token
sees no key, its attention output is zero with a patch, but undefined in the original.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from attnzoo.adapter import Adapter, Attend, PatchPoint, request_for
from attnzoo.adapters.longformer import VERSIONS, LongformerAttention
from attnzoo.adapters.longformer_mask import MaskFunction, OneRowMaskPoint
from attnzoo.patching.mask_arguments import DECODER_MASKS, MaskCheckPoint
from attnzoo.spec.documents import attend_documents
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.masks import read_attention_mask
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest

_MODULE = "transformers.models.led.modeling_led"
_ENCODER_FORWARD = ("47720093331635f3", "d710ce36e019c88c")


class EncoderMasks(OneRowMaskPoint):
    """Patch point of the encoder. The patched encoder builds a padding mask with only one row."""

    cls = f"{_MODULE}:LEDEncoder"
    verified = {
        f"{_MODULE}:LEDEncoder.forward": _ENCODER_FORWARD,
        f"{_MODULE}:_prepare_4d_attention_mask_inverted": ("024fcf92449bc256",),
    }
    mask_function = "_prepare_4d_attention_mask_inverted"

    def one_row(self, make: MaskFunction) -> MaskFunction:
        return partial(make, tgt_len=1)


class DecoderMasks(MaskCheckPoint):
    """Patch point that checks the masks of the decoder."""

    cls = f"{_MODULE}:LEDDecoder"
    masks = DECODER_MASKS


class EncoderAttention(LongformerAttention):
    """Patch point of Longformer's attention in LED's encoder."""

    cls = f"{_MODULE}:LEDEncoderSelfAttention"
    verified = {
        f"{_MODULE}:LEDEncoderSelfAttention.forward": ("6d782e2d0280dde0",),
        f"{_MODULE}:LEDEncoderSelfAttention._concat_with_global_key_attn_probs": ("2bd1410c2ba1cc7d",),
        f"{_MODULE}:LEDEncoderSelfAttention._compute_global_attn_output_from_hidden": ("c6f95642ee01b416",),
        f"{_MODULE}:LEDEncoder.forward": _ENCODER_FORWARD,
    }


class DecoderAttention(PatchPoint):
    """Patch point of the decoder's attention. A call with ``key_value_states`` computes cross-attention."""

    cls = f"{_MODULE}:LEDDecoderAttention"
    traceable = True
    verified = {
        f"{_MODULE}:LEDDecoderAttention.forward": ("3eb1956ac64b70a7", "34b20400a876a799"),
        f"{_MODULE}:LEDDecoder.forward": ("4797df659fe32543", "efe619d6f6d3eef9", "3da83f396233599f"),
    }

    def describe(self, module: Any) -> str:
        return "masked (decoder self or cross)"

    def requests(self, module: Any) -> tuple[Request, ...]:
        heads, patterns = module.num_heads, (Full(cross=True), Full(), Causal(offset=0))
        segments = [SegmentRequest(pattern, heads, key_mask=True) for pattern in patterns]
        return tuple(request_for(module, heads, module.head_dim, segment) for segment in segments)

    def dropout(self, module: Any) -> float:
        return float(module.dropout)

    def forward(
        self,
        module: Any,
        attend: Attend,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        past_key_values: Any = None,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Return states ``(batch, length, embed)``, weights (None unless requested), and the cache.

        A call with ``key_value_states`` computes cross-attention. Other calls compute self-attention. The cache is
        called ``past_key_values`` before transformers 5.24.
        """
        cache = past_key_values if cache is None else cache
        query = split_heads(module.q_proj(hidden_states), module.head_dim)
        key, value = _keys_values(module, hidden_states, key_value_states, cache)
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
        return output, None if result.probabilities is None else result.probabilities[0], cache


def _keys_values(module: Any, states: Tensor, encoder_states: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]:
    """Return keys and values ``(batch, heads, kv_len, head_dim)``. If a cache is given, read and update the cache.

    An ``EncoderDecoderCache`` contains a cache for self-attention and a cache for cross-attention. The first call of
    cross-attention fills the cache for cross-attention, and later calls only read this cache.
    """
    cross = encoder_states is not None
    filled = getattr(cache, "is_updated", None)
    store = cache
    if filled is not None:
        store = cache.cross_attention_cache if cross else cache.self_attention_cache
        if cross and filled.get(module.layer_idx):
            layer = store.layers[module.layer_idx]
            return layer.keys, layer.values
    source = states if encoder_states is None else encoder_states
    key, value = (split_heads(project(source), module.head_dim) for project in (module.k_proj, module.v_proj))
    if store is not None:
        key, value = store.update(key, value, module.layer_idx)
        if cross and filled is not None:
            filled[module.layer_idx] = True
    return key, value


LED = Adapter(
    model_types=("led",),
    versions=VERSIONS,
    points=(EncoderAttention(), EncoderMasks(), DecoderMasks(), DecoderAttention()),
)
