"""GPTBigCode (SantaCoder, StarCoder): multi-query or multi-head attention (Shazeer 2019, arXiv:1911.02150).

Self-attention gets its attention function from transformers' ``AttentionInterface``. The model's code computes the
projections, the split into queries, keys and values, and the caches. Like the original, this adapter always computes
the softmax of half-precision scores in float32. So ``attention_softmax_in_fp32`` and
``scale_attention_softmax_in_fp32`` have no effect. With ``scale_attn_weights=False``, scores are not scaled.

transformers' cross-attention (``config.add_cross_attention``) is wrong. It splits keys and values at the wrong width,
and applies the decoder's causal mask to the encoder's tokens. The model raises an error for a 2-D encoder mask, and the
attention ignores a 3-D encoder mask. If a module is called a second time with the same cache, it appends the cached
keys to the cache again and raises an error. This adapter repairs cross-attention:

- Weights. ``c_attn`` has ``2 x embed_dim`` outputs in the layout ``(heads, 2 x head_dim)``. The first half of a head's
  outputs is the key, and the second half is the value. The size of the weight decides the number of key heads. So a
  multi-query ``c_attn`` with ``2 x head_dim`` outputs also works, although transformers cannot build such a layer.
- Masks. ``encoder_attention_mask`` has the shape ``(batch, encoder_length)`` or ``(batch, 1 or length,
  encoder_length)`` and contains bool, or 0 and 1. A query sees the tokens with the value True or 1. A sample without
  visible encoder tokens has an attention output of zero. Decoder masks and ``is_causal`` have no effect.
- Caches. The model passes no cache to its cross-attention, so every call computes the keys from the encoder's states.
  If a user passes an ``EncoderDecoderCache`` to the module, the first call fills the cross-attention half of the cache.

With ``backend="native"``, a cross-attention module runs transformers' code, and its results are wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnzoo.adapter import Adapter, Attend, PatchPoint, request_for
from attnzoo.errors import InvalidArgumentError
from attnzoo.functional import compute_dtype
from attnzoo.patching.interface import InterfacePoint
from attnzoo.patching.mask_arguments import CROSS_VISIBILITY, DECODER_MASK, MaskCheckPoint, check_visibility
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest, describe

_MODULE = "transformers.models.gpt_bigcode.modeling_gpt_bigcode"
_MASK = "encoder_attention_mask"


class ModelMasks(MaskCheckPoint):
    """Patch point that checks the attention mask of models that have no cross-attention."""

    cls = f"{_MODULE}:GPTBigCodeModel"
    masks = {"attention_mask": DECODER_MASK}


class CrossModelMasks(ModelMasks):
    """Patch point that checks the decoder mask and the encoder mask of models that have cross-attention.

    The point also expands the encoder mask to three dimensions, because the model's original forward requires this.
    """

    verified = {f"{_MODULE}:GPTBigCodeModel.forward": ("19f5b50c3ae23f0f", "242ed84d9deb2fa8")}
    masks = {"attention_mask": DECODER_MASK, _MASK: CROSS_VISIBILITY}
    traceable = False  # the check of the encoder mask reads values

    def serves(self, module: Any) -> bool:
        # Other mask checks skip a model whose forward was replaced. This point does not, because 2-D masks would fail.
        return bool(module.config.add_cross_attention)

    def describe(self, module: Any) -> str:
        return "prepares the encoder mask"


class _Attention(PatchPoint):
    """Base class of the patch points of self-attention and cross-attention."""

    cls = f"{_MODULE}:GPTBigCodeAttention"
    cache = ("layer_past",)

    def dropout(self, module: Any) -> float:
        return float(module.attn_dropout)

    def wants_probabilities(self, module: Any, kwargs: Mapping[str, Any]) -> bool:
        # The model passes `output_attentions=False` if the user passed nothing, so False does not override the config.
        return bool(kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False))


class SelfAttention(_Attention, InterfacePoint):
    """Patch point of causal self-attention."""

    verified = {
        f"{_MODULE}:GPTBigCodeAttention.forward": ("c39be72d161b452f", "912b27e2f8019507"),
        f"{_MODULE}:GPTBigCodeBlock.forward": ("4e057486e762c36c",),
        f"{_MODULE}:eager_attention_forward": ("092b81b99e8fc6eb",),
    }

    def serves(self, module: Any) -> bool:
        return not module.is_cross_attention

    def describe(self, module: Any) -> str:
        return f"causal, {'multi-query' if module.kv_heads == 1 else 'multi-head'}"

    def requests(self, module: Any) -> tuple[Request, ...]:
        segment = SegmentRequest(Causal(offset=0), module.kv_heads)
        return (request_for(module, module.num_heads, module.head_dim, segment),)


class CrossAttention(_Attention):
    """Patch point that repairs cross-attention."""

    verified = {
        f"{_MODULE}:GPTBigCodeAttention.__init__": ("3df96d659edfe3dd",),
        f"{_MODULE}:GPTBigCodeAttention.forward": ("c39be72d161b452f", "912b27e2f8019507"),
        f"{_MODULE}:GPTBigCodeBlock.forward": ("4e057486e762c36c",),
    }

    def serves(self, module: Any) -> bool:
        return bool(module.is_cross_attention)

    def fault(self, module: Any) -> str | None:
        return "transformers' cross-attention of GPTBigCode splits keys and values at the wrong width"

    def describe(self, module: Any) -> str:
        return "cross, key padding (repaired)"

    def requests(self, module: Any) -> tuple[Request, ...]:
        kv_heads = module.c_attn.out_features // (2 * module.head_dim)
        segment = SegmentRequest(Full(cross=True), kv_heads, key_mask=True)
        return (request_for(module, module.num_heads, module.head_dim, segment),)

    def forward(
        self,
        module: Any,
        attend: Attend,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return states ``(batch, length, embed)`` and weights ``(batch, heads, length, encoder_length)`` if requested.

        ``attention_mask`` and ``is_causal`` have no effect, because they describe the decoder's tokens.

        Raises:
            InvalidArgumentError: the cache is not an ``EncoderDecoderCache``, there are neither encoder states nor a
                filled cache, or the encoder mask has a wrong shape, dtype or device.
        """
        query = split_heads(module.q_attn(hidden_states), module.head_dim)
        key, value = _keys_values(module, hidden_states, encoder_hidden_states, layer_past)
        query, key, value = (tensor.to(compute_dtype(query)) for tensor in (query, key, value))
        key_mask, mask = _masks(encoder_attention_mask, query, key)
        segment = Segment(key, value, Full(cross=True), key_mask, mask)
        dropout = module.attn_dropout if module.training else 0.0
        wanted = self.wants_probabilities(module, {"output_attentions": output_attentions})
        result = attend(Attention(query, (segment,), module.scaling, dropout), wanted)
        output = module.c_proj(merge_heads(result.output))
        return module.resid_dropout(output), None if result.dropped is None else result.dropped[0]


def _keys_values(module: Any, states: Tensor, encoder_states: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]:
    """Return keys and values ``(batch, kv_heads, encoder_length, head_dim)``, from ``cache`` if it is filled.

    Otherwise, compute them from ``encoder_states``, and store them in ``cache`` unless it is None.
    """
    filled = getattr(cache, "is_updated", None)
    if cache is not None and filled is None:
        raise InvalidArgumentError("layer_past", type(cache).__name__, "an EncoderDecoderCache, or None")
    if filled is not None and filled.get(module.layer_idx):
        layer = cache.cross_attention_cache.layers[module.layer_idx]
        return layer.keys, layer.values
    if encoder_states is None:
        raise InvalidArgumentError("encoder_hidden_states", "None", "the encoder's states, or a filled layer_past")
    _check_states(encoder_states, states)
    both = split_heads(module.c_attn(encoder_states), 2 * module.head_dim)
    key, value = both.split(module.head_dim, dim=-1)
    if filled is not None:
        key, value = cache.cross_attention_cache.update(key, value, module.layer_idx)
        filled[module.layer_idx] = True
    return key, value


def _check_states(encoder_states: object, hidden_states: Tensor) -> None:
    """Raise unless encoder and decoder states have the same batch size, width and (after autocast) dtype."""
    batch, _, width = hidden_states.shape
    if (
        not isinstance(encoder_states, Tensor)
        or encoder_states.ndim != 3
        or (encoder_states.shape[0], encoder_states.shape[2]) != (batch, width)
        or compute_dtype(encoder_states) != compute_dtype(hidden_states)
    ):
        dtype = str(hidden_states.dtype).removeprefix("torch.")
        allowed = f"shape ({batch}, encoder_length, {width}), {dtype}, like the decoder's states"
        raise InvalidArgumentError("encoder_hidden_states", describe(encoder_states), allowed)


def _masks(given: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Convert the encoder mask ``given`` to a pair ``(key_mask, mask)``, in which at least one mask is None.

    If ``given`` has one row for all queries, the result is a key mask ``(batch, encoder_length)``. Otherwise it is a
    mask ``(batch, 1, length, encoder_length)``. If ``given`` is 4-D, its dimension 1 or its dimension 2 has the size 1.
    """
    if given is None:
        return None, None
    mask = given.flatten(1, 2) if isinstance(given, Tensor) and given.ndim == 4 else given
    visible = check_visibility(_MASK, mask, query.shape[0], key.shape[2], query.device, query.shape[2])
    return (visible[:, 0], None) if visible.shape[1] == 1 else (None, visible[:, None])


GPT_BIGCODE = Adapter(
    model_types=("gpt_bigcode",),
    versions="5.17 to 5.24",
    examples=({"multi_query": True}, {"multi_query": False, "add_cross_attention": True}),
    points=(SelfAttention(), CrossAttention(), CrossModelMasks(), ModelMasks()),
)
