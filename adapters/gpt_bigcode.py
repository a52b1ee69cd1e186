"""GPTBigCode (SantaCoder, StarCoder): multi-query or multi-head attention (Shazeer 2019, arXiv:1911.02150).

Self-attention looks its attention function up in transformers' interface, so that is its point: projections, the split
of queries, keys and values, and caches stay the model's. Its code computes the softmax of half precision in float32
whatever ``attention_softmax_in_fp32`` and ``scale_attention_softmax_in_fp32`` say, and so do we; ``scale_attn_weights``
decides the scale.

Cross-attention (``config.add_cross_attention``) does not work in transformers: keys and values are split at the wrong
width, the causal mask of the decoder is applied to the encoder's tokens, the encoder's own mask is ignored (and, if
2-D, fails an assertion), and with a cache of its own a second call has no query and appends the keys again. Here it is
whole, with these decisions:

- Weights. ``c_attn`` maps to ``2 x embed_dim``, read as ``(heads, 2 x head_dim)``: each head's key beside its value.
  Self-attention lays heads out the same way, and the widths of the original's split say so too. There are as many key
  heads as the weight has room for, so a multi-query ``c_attn`` of ``2 x head_dim`` serves too (transformers refuses to
  build one).
- Masks. Every query sees every encoder token that ``encoder_attention_mask`` shows: ``(batch, encoder_length)``, or
  ``(batch, 1 or length, encoder_length)``, of bool or 0 and 1. A sample whose encoder tokens are all hidden gets zeros
  from the attention. Decoder masks and ``is_causal`` do not concern it.
- Caches. The model hands its cross-attention no cache, so its keys are computed from the encoder's states on every
  call. Called with an ``EncoderDecoderCache``, it fills the cross half once and reads it afterwards.

With ``backend="native"`` a cross-attention module runs transformers' code, as broken as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from attnzoo.adapter import Adapter, Attend, Forward, PatchPoint, bind_function, parameter_of
from attnzoo.errors import InvalidArgumentError
from attnzoo.functional import compute_dtype
from attnzoo.patching.companions import companion
from attnzoo.patching.interface import bind_interface, check_interface
from attnzoo.patching.mask_arguments import DECODER_MASK, checking
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Request, Result, Segment, SegmentRequest, describe
from attnzoo.spec.transforms import readable

T = TypeVar("T")
_MODULE = "transformers.models.gpt_bigcode.modeling_gpt_bigcode"
_MASK = "encoder_attention_mask"


def _wants_probabilities(module: Any, kwargs: Mapping[str, Any]) -> bool:
    """The block passes ``output_attentions=False`` when nobody said anything, so False leaves it to the config."""
    return bool(kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False))


# --- self-attention


class _WithProbabilities:
    """An :class:`Attend` that asks for the attention probabilities."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    @property
    def complete(self) -> bool:
        return self._attend.complete

    def __call__(self, attention: Attention, probabilities: bool = True) -> Result:
        return self._attend(attention, True)

    def takes(self, attention: Attention) -> bool:
        return False  # the parts that an attention may be split into give no probabilities of the whole

    def falls_back(self, can: bool = True) -> bool:
        return self._attend.falls_back(can)

    def cached_per_forward(self, tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
        return self._attend.cached_per_forward(tensor, name, make)


def _self_bind(cls: type, attend: Attend) -> Forward:
    """The module's own forward. It does not tell its attention function of ``output_attentions``; we do."""
    plain, asking = bind_interface(cls, attend), bind_interface(cls, _WithProbabilities(attend))

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return (asking if _wants_probabilities(module, kwargs) else plain)(module, *args, **kwargs)

    return forward


def _self_requests(module: Any) -> tuple[Request, ...]:
    parameter, dim = parameter_of(module), module.head_dim
    segment = SegmentRequest(Causal(offset=0), module.kv_heads)
    return (Request(parameter.device.type, parameter.dtype, module.num_heads, dim, dim, (segment,)),)


# --- cross-attention


def _cross_forward(
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
    """Cross-attention: ``(batch, length, embed)`` in and out, with weights ``(batch, heads, length, encoder_length)``.

    ``attention_mask`` and ``is_causal`` are the decoder's own: they say nothing of the encoder's tokens.

    Raises:
        InvalidArgumentError: a cache without room for cross-attention, neither encoder states nor a filled cache, or
            an encoder mask that does not fit.
    """
    query = split_heads(module.q_attn(hidden_states), module.head_dim)
    key, value = _keys_values(module, hidden_states, encoder_hidden_states, layer_past)
    query, key, value = (tensor.to(compute_dtype(query)) for tensor in (query, key, value))
    key_mask, mask = _masks(encoder_attention_mask, query, key)
    segment = Segment(key, value, Full(cross=True), key_mask, mask)
    dropout = module.attn_dropout if module.training else 0.0
    wanted = _wants_probabilities(module, {"output_attentions": output_attentions})
    result = attend(Attention(query, (segment,), module.scaling, dropout), wanted)
    output = module.c_proj(merge_heads(result.output))
    return module.resid_dropout(output), None if result.dropped is None else result.dropped[0]


def _keys_values(
    module: Any, hidden_states: Tensor, encoder_states: Tensor | None, cache: Any
) -> tuple[Tensor, Tensor]:
    """Keys and values ``(batch, kv_heads, encoder_length, head_dim)``, through the cross half of a cache, if any."""
    filled = getattr(cache, "is_updated", None)
    if cache is not None and filled is None:
        raise InvalidArgumentError("layer_past", type(cache).__name__, "an EncoderDecoderCache, or None")
    if filled is not None and filled.get(module.layer_idx):
        layer = cache.cross_attention_cache.layers[module.layer_idx]
        return layer.keys, layer.values
    if encoder_states is None:
        raise InvalidArgumentError("encoder_hidden_states", "None", "the encoder's states, or a cache filled with them")
    _check_states(encoder_states, hidden_states)
    both = split_heads(module.c_attn(encoder_states), 2 * module.head_dim)
    key, value = both.split(module.head_dim, dim=-1)
    if filled is not None:
        key, value = cache.cross_attention_cache.update(key, value, module.layer_idx)
        filled[module.layer_idx] = True
    return key, value


def _check_states(encoder_states: object, hidden_states: Tensor) -> None:
    """Raise unless the encoder's states are like the decoder's but for length, device, and dtype under autocast."""
    batch, _, width = hidden_states.shape
    if (
        not isinstance(encoder_states, Tensor)
        or encoder_states.ndim != 3
        or (encoder_states.shape[0], encoder_states.shape[2]) != (batch, width)
        or compute_dtype(encoder_states) != compute_dtype(hidden_states)
    ):
        dtype = str(hidden_states.dtype).removeprefix("torch.")
        allowed = f"({batch}, encoder_length, {width}) {dtype}, as the decoder's states"
        raise InvalidArgumentError("encoder_hidden_states", describe(encoder_states), allowed)


def _masks(given: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The encoder mask as a mask of keys ``(batch, encoder_length)``, or of queries and keys if it tells queries apart.

    The model passes on ``(batch, 1, length, encoder_length)``, with the middle two exchanged if it is multi-query.
    """
    if given is None:
        return None, None
    visible = _visible(given)
    (batch, _, q_len, _), kv_len = query.shape, key.shape[2]
    if visible.ndim == 4:
        visible = visible.flatten(1, 2)
    elif visible.ndim == 2:
        visible = visible[:, None]
    if tuple(visible.shape) not in ((batch, 1, kv_len), (batch, q_len, kv_len)):
        _refuse_mask(given, batch, q_len, kv_len)
    return (visible[:, 0], None) if visible.shape[1] == 1 else (None, visible[:, None])


def _refuse_mask(mask: Tensor, batch: int | str, q_len: int | str, kv_len: int | str) -> NoReturn:
    shapes = f"({batch}, {kv_len}) or ({batch}, 1 or {q_len}, {kv_len})"
    raise InvalidArgumentError(_MASK, describe(mask), f"bool, or 0 and 1, of shape {shapes}: True where visible")


def _visible(mask: Tensor) -> Tensor:
    """A mask of bool, or of 0 and 1, as bool. An additive mask means the opposite, so it is refused, as NaN is."""
    if mask.dtype == torch.bool:
        return mask
    if not readable(mask):
        raise InvalidArgumentError(_MASK, f"{describe(mask)} under vmap, where its values cannot be checked", "bool")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InvalidArgumentError(_MASK, f"{describe(mask)} with other values than 0 and 1", "bool, or 0 and 1")
    return mask.bool()


def _cross_requests(module: Any) -> tuple[Request, ...]:
    parameter, dim = parameter_of(module), module.head_dim
    segment = SegmentRequest(Full(cross=True), module.c_attn.out_features // (2 * dim), key_mask=True)
    return (Request(parameter.device.type, parameter.dtype, module.num_heads, dim, dim, (segment,)),)


def _model_bind(cls: Any, attend: Attend) -> Forward:
    """The model's own forward, which asserts that an encoder mask has three dimensions; it gets one that has."""
    own = cls.forward
    index = list(inspect.signature(own).parameters).index(_MASK) - 1  # without self

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > index:
            args = (*args[:index], _three_dimensional(args[index]), *args[index + 1 :])
        elif _MASK in kwargs:
            kwargs[_MASK] = _three_dimensional(kwargs[_MASK])
        return own(module, *args, **kwargs)

    return forward


def _three_dimensional(mask: Tensor | None) -> Tensor | None:
    """``(batch, encoder_length)`` or ``(batch, 1 or length, encoder_length)`` as the latter, of bool."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3):
        _refuse_mask(mask, "batch", "length", "encoder_length")
    visible = _visible(mask)
    return visible[:, None] if visible.ndim == 2 else visible


_SELF_MASK = {"attention_mask": DECODER_MASK}

GPT_BIGCODE = Adapter(
    model_types=("gpt_bigcode",),
    versions="5.17 to 5.23",
    examples=({"multi_query": True}, {"multi_query": False, "add_cross_attention": True}),
    points=(
        PatchPoint(
            cls=f"{_MODULE}:GPTBigCodeAttention",
            when=lambda module: not module.is_cross_attention,
            bind=_self_bind,
            describe=lambda module: f"causal, {'multi-query' if module.kv_heads == 1 else 'multi-head'}",
            requests=_self_requests,
            dropout=lambda module: float(module.attn_dropout),
            check=check_interface,
            wants_probabilities=_wants_probabilities,
            verified={
                f"{_MODULE}:GPTBigCodeAttention.forward": ("c39be72d161b452f",),
                f"{_MODULE}:GPTBigCodeBlock.forward": ("4e057486e762c36c",),
                f"{_MODULE}:eager_attention_forward": ("092b81b99e8fc6eb",),
            },
        ),
        PatchPoint(
            cls=f"{_MODULE}:GPTBigCodeAttention",
            when=lambda module: module.is_cross_attention,
            bind=bind_function(_cross_forward),
            describe=lambda module: "cross, key padding (repaired)",
            fault=lambda module: (
                "transformers' cross-attention of GPTBigCode splits keys and values at the wrong width"
            ),
            requests=_cross_requests,
            dropout=lambda module: float(module.attn_dropout),
            wants_probabilities=_wants_probabilities,
            verified={
                f"{_MODULE}:GPTBigCodeAttention.__init__": ("3df96d659edfe3dd",),
                f"{_MODULE}:GPTBigCodeAttention.forward": ("c39be72d161b452f",),
                f"{_MODULE}:GPTBigCodeBlock.forward": ("4e057486e762c36c",),
            },
        ),
        PatchPoint(
            cls=f"{_MODULE}:GPTBigCodeModel",
            when=lambda module: module.config.add_cross_attention,
            bind=checking(lambda module: _SELF_MASK, _model_bind),
            attends=False,
            describe=lambda module: "prepares the encoder mask",
            verified={f"{_MODULE}:GPTBigCodeModel.forward": ("19f5b50c3ae23f0f",)},
        ),
        companion(f"{_MODULE}:GPTBigCodeModel", checking(lambda module: _SELF_MASK), {}, "checks masks"),
    ),
)
