"""Any model of transformers whose attention modules call the ``AttentionInterface``.

The forward of such a module computes query, key and value, gets an attention function from ``ALL_ATTENTION_FUNCTIONS``
by ``config._attn_implementation``, and calls this function. The arguments of the call define the attention, so one
patch point serves all these modules. Families with special attention have separate adapters, which are preferred.

The original attention function is ``sdpa_attention_forward`` for ``sdpa``, and the eager function of the modeling file
for ``eager``. :mod:`attnzoo.adapters.eager_forms` lists what the eager functions compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Adapter, Attend, request_for
from attnzoo.adapters.eager_forms import EagerForm, form_of
from attnzoo.errors import InvalidArgumentError, KeywordRefusedError, PatchError
from attnzoo.functional import compute_dtype
from attnzoo.patching.interface import InterfacePoint, read_interface_mask
from attnzoo.registry import ANY_MODEL_TYPE
from attnzoo.spec.bias import Bias, DenseBias, RelativeBias
from attnzoo.spec.documents import attend_documents
from attnzoo.spec.patterns import Causal, Full, Pattern, Window
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest, describe

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_SDPA = "transformers.integrations.sdpa_attention:sdpa_attention_forward"
# What `sdpa_attention_forward` computes.
_SDPA_FORM = EagerForm(position_bias=True)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_attn_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")
_DROPOUT = ("attention_dropout", "attn_dropout", "dropout_p", "dropout")


class AnyInterfaceAttention(InterfacePoint):
    """Patch point of every module whose forward gets its attention function from ``AttentionInterface``."""

    cls = "torch.nn.modules.module:Module"
    verified = {
        _SDPA: ("585929b0ca273c82", "5afe3de6f11cb3e4", "db2955eaed8b38ad"),
        "transformers.modeling_utils:AttentionInterface.get_interface": ("6a7fc2699cc17286", "55451b3b503a59dc"),
    }

    def serves(self, module: Any) -> bool:
        forward = inspect.unwrap(type(module).forward)
        if not isinstance(forward, FunctionType) or not {_INTERFACE, "get_interface"} <= {*forward.__code__.co_names}:
            return False
        from transformers import AttentionInterface

        return isinstance(forward.__globals__.get(_INTERFACE), AttentionInterface) and hasattr(module, "config")

    def verified_class(self, module: Any) -> type:
        return type(module)  # any forward that calls the interface

    def check(self, module: Any) -> None:
        super().check(module)
        form_of(type(module))
        _check_wrappers(type(module))

    def describe(self, module: Any) -> str:
        window = _window(module)
        pattern = "causal" if _is_causal(module) else "full"
        return pattern if window is None else f"{pattern}, window {window}"

    def requests(self, module: Any) -> tuple[Request, ...]:
        """Return the request that the attributes of the module suggest, or nothing if an attribute is missing."""
        heads, head_dim = _integer(module, _HEADS), _integer(module, _HEAD_DIM)
        if heads is None or head_dim is None:
            return ()
        kv_heads = _integer(module, ("num_key_value_heads",))
        if kv_heads is None:
            kv_heads = heads // (getattr(module, "num_key_value_groups", None) or 1)
        window = _window(module)
        pattern: Pattern = Full()
        if _is_causal(module):
            pattern = Causal(offset=0) if window is None else Window(window - 1, 0, offset=0)
        form = form_of(type(module))
        segments = [SegmentRequest(pattern, kv_heads, bias="dense" if form.position_bias else None)]
        if form.sinks:
            segments.append(SegmentRequest(Full(), 1, bias="relative"))
        request = request_for(module, heads, head_dim, *segments)
        has_softcap = form.softcap and getattr(module, "attn_logit_softcapping", None) is not None
        return (replace(request, softcap=has_softcap),)

    def dropout(self, module: Any) -> float:
        for name in _DROPOUT:
            value = getattr(module, name, None)
            value = getattr(value, "p", value)
            if isinstance(value, float | int):
                return float(value)
        return 0.0

    def constants_of(self, cls: Any) -> Mapping[str, Any]:
        return {"form": form_of(cls)}

    def compute(
        self,
        module: Any,
        attend: Attend,
        implementation: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        output_attentions: bool = False,
        position_bias: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        form: EagerForm = _SDPA_FORM,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute an attention in place of an attention function of transformers.

        ``sliding_window`` has no effect, because the mask contains the window. ``s_aux`` has no effect, because eager
        functions read the sinks of the module.
        """
        if implementation == "sdpa":
            form = _SDPA_FORM
        elif not module.training:
            dropout = 0.0  # eager functions read the mode of the module, sdpa uses the argument
        _refuse("softcap", softcap, form.softcap)
        _refuse("sinks", sinks, form.sinks == "argument")
        _refuse("s_aux", s_aux, form.sinks == "module")
        _refuse("position_bias", position_bias, form.position_bias)
        _refuse("output_attentions", output_attentions or None, form.weights_with_sinks)
        if implementation == "eager" and attention_mask is not None and attention_mask.dtype == torch.bool:
            allowed = "a float mask, because the eager attention function adds the mask to the scores"
            raise InvalidArgumentError("attention_mask", describe(attention_mask), allowed)
        if form.scale_of_module or scaling is None:
            scaling = query.shape[-1] ** -0.5
        if is_causal is None:
            is_causal = _is_causal(module)
        mask = attention_mask if form.reads_mask else None
        dtype = compute_dtype(value)  # models may leave queries and keys in float32
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        read = read_interface_mask(attend, implementation, query, key, mask, is_causal)
        bias = _sum(read.bias, position_bias, query.shape[2], key.shape[2])
        segment = Segment(key, value, read.pattern, read.key_mask, read.mask, bias)
        segments = (segment, *_sink_segments(segment, module.sinks if form.sinks == "module" else sinks))
        attention = Attention(query, segments, scaling, dropout, softcap=softcap)
        documents = read.documents if len(segments) == 1 else None
        if documents is None:
            result = attend(attention, output_attentions)
        else:
            result = attend_documents(attend, attention, documents, output_attentions)
        return result.output.transpose(1, 2).contiguous(), None if result.dropped is None else result.dropped[0]


def _check_wrappers(cls: Any) -> None:
    """Raise if code outside transformers has wrapped the forward, because a patch runs a copy without wrappers."""
    forward = cls.forward
    if inspect.unwrap(forward) is not forward and not forward.__globals__["__name__"].startswith("transformers."):
        raise PatchError(
            f"{cls.__name__}.forward: got a function that {forward.__globals__['__name__']} has wrapped; allowed: a "
            "function without wrappers, because a patch would drop them"
        )


def _refuse(keyword: str, value: object, computed: bool) -> None:
    if value is not None and not computed:
        got = describe(value) if isinstance(value, Tensor) else repr(value)
        raise KeywordRefusedError(keyword, got, "None, because the original attention function does not compute it")


def _is_causal(module: Any) -> bool:
    return bool(getattr(module, "is_causal", True))


def _window(module: Any) -> int | None:
    config, window = module.config, getattr(module, "sliding_window", None)
    if not hasattr(module, "sliding_window") and getattr(config, "layer_types", None) is None:
        window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and not isinstance(window, bool) and window > 1 else None


def _integer(module: Any, names: tuple[str, ...]) -> int | None:
    """Return the first integer attribute with one of these names, of the module or of its config."""
    for owner in (module, module.config):
        for name in names:
            try:
                value = getattr(owner, name, None)
            except RuntimeError:  # a config whose layers have different values
                value = None
            if isinstance(value, int) and value > 0:
                return value
    return None


def _sum(bias: DenseBias | None, position_bias: Tensor | None, q_len: int, kv_len: int) -> DenseBias | None:
    """Return the sum of the bias in the mask and the position bias, which may have size 1 in each dimension."""
    if position_bias is None:
        return bias
    values = position_bias.expand(-1, -1, q_len, kv_len)
    return DenseBias(values if bias is None else values + bias.values)


def _sink_segments(segment: Segment, sinks: Tensor | None) -> tuple[Segment, ...]:
    """Return a segment with one key, whose scores are the sinks. The key and its value are zero.

    ``sinks`` are ``(heads,)`` or ``(batch, heads, q_len, 1)``. None means no sinks, and no segment.
    """
    if sinks is None:
        return ()
    bias: Bias = RelativeBias(sinks[:, None], zero=0) if sinks.ndim == 1 else DenseBias(sinks)
    key, value = (tensor.new_zeros((tensor.shape[0], 1, 1, tensor.shape[3])) for tensor in (segment.key, segment.value))
    return (Segment(key, value, Full(), bias=bias),)


GENERIC = Adapter(
    model_types=(ANY_MODEL_TYPE,),
    versions="5.17 to 5.24",
    points=(AnyInterfaceAttention(),),
    examples=({"model_type": "llama"}, {"model_type": "mistral"}, {"model_type": "bert"}),
)
