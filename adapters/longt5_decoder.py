"""LongT5's decoder: causal self-attention with a relative bias, and cross-attention, both with caches.

The module runs its own forward, with its projections and its caching; only the attention function in it is replaced. In
place of a bias as large as the scores, that forward passes along a small object that it does not look at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend, Forward, parameter_of
from attnzoo.adapters.longt5_bias import bucketed, check_buckets, side_reach
from attnzoo.errors import BackendRefusedError, KeywordRefusedError
from attnzoo.functional import compute_dtype
from attnzoo.patching.interface import check_interface, read_interface_mask, rebind
from attnzoo.patching.keywords import parameters, refuse_uncomputed
from attnzoo.spec.bias import Bias, DenseBias, RelativeBias
from attnzoo.spec.documents import attend_documents
from attnzoo.spec.patterns import Causal, Full, Pattern
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest

_TABLE = "relative_attention_bias"
_NO_BIAS = object()  # keeps the model's forward from making a bias of zeros as large as the scores


def _decoder_forward(
    module: Any,
    attend: Attend,
    run: Callable[..., tuple[Tensor, Any, Tensor | None]],
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The module's own forward ``run``, with a bias it passes along unseen to the attention function given to it."""
    values = position_bias
    bias: Any = position_bias
    if position_bias is None and not module.has_relative_attention_bias:
        bias = _NO_BIAS
    elif position_bias is None and attend.complete:
        values = bucketed(module, _TABLE, side_reach(module))
    if values is not None and values.ndim == 2:
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length(module.layer_idx))
        bias = RelativeBias(values, zero=side_reach(module), offset=seen)
    output, passed, weights = run(hidden_states, mask, key_value_states, bias, past_key_values, **kwargs)
    if passed is _NO_BIAS:
        passed = None
    return output, values if isinstance(passed, Bias) else passed, weights


class _Interface:
    """Stands where the modelling file expects ``ALL_ATTENTION_FUNCTIONS``, for one module."""

    def __init__(self, attend: Attend, own: Any) -> None:
        self._attend, self._own = attend, own

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor | None]]:
        def attention_function(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            own: Callable[..., tuple[Tensor, Tensor | None]] = self._own.get_interface(name, default)
            try:
                refuse_uncomputed(kwargs, also=parameters(own), known=_COMPUTED)
                return self._call(name, module, *args, **kwargs)
            except (BackendRefusedError, KeywordRefusedError):
                # The module's cache is filled by now: what falls back is the attention function, not the forward.
                if not self._attend.falls_back():
                    raise
                if kwargs["position_bias"] is _NO_BIAS:
                    kwargs["position_bias"] = None
                return own(module, *args, **kwargs)

        return attention_function

    def _call(
        self,
        name: str,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float,
        scaling: float,
        position_bias: Any,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        check_interface(module)
        bias = DenseBias(position_bias) if isinstance(position_bias, Tensor) else position_bias
        bias = None if bias is _NO_BIAS else bias
        read = read_interface_mask(self._attend, name, query, key, attention_mask, module.is_causal)
        if read.bias is not None:
            bias = read.bias if bias is None else _sum(query, key, bias, read.bias)
        query, key, value = (tensor.to(compute_dtype(tensor)) for tensor in (query, key, value))
        pattern = Full(cross=not module.is_causal) if isinstance(read.pattern, Full) else read.pattern
        segment = Segment(key, value, pattern, read.key_mask, read.mask, bias)
        attention = Attention(query, (segment,), scaling, dropout)
        result = attend_documents(self._attend, attention, read.documents, output_attentions)
        return result.output.transpose(1, 2).contiguous(), None if result.dropped is None else result.dropped[0]


_COMPUTED = parameters(_Interface._call)


def _sum(query: Tensor, key: Tensor, bias: Bias, rest: DenseBias) -> DenseBias:
    """The bias on top of what a caller's own additive mask adds."""
    batch, heads, q_len, _ = query.shape
    rows, columns = (torch.arange(n, device=query.device) for n in (q_len, key.shape[2]))
    dense = Segment(key, key, bias=bias).bias_at(rows, columns, q_len, batch, heads)
    return DenseBias(rest.values if dense is None else rest.values + dense)


def bind_decoder(cls: Any, attend: Attend) -> Forward:
    """The forward of the class, whose attention function is the site's backend."""
    own = inspect.unwrap(cls.forward).__globals__["ALL_ATTENTION_FUNCTIONS"]
    run = rebind(cls.forward, ALL_ATTENTION_FUNCTIONS=_Interface(attend, own))
    return lambda module, *args, **kwargs: _decoder_forward(module, attend, partial(run, module), *args, **kwargs)


def request(module: Any, *segments: SegmentRequest) -> tuple[Request, ...]:
    """One request of a module, for the segments it will look at."""
    parameter, dim = parameter_of(module), module.key_value_proj_dim
    return (Request(parameter.device.type, parameter.dtype, module.n_heads, dim, dim, segments),)


def decoder_requests(module: Any) -> tuple[Request, ...]:
    """What a decoder site will ask of its backend."""
    bias = "relative" if module.is_causal else None
    patterns: tuple[Pattern, ...] = (Causal(offset=0), Full()) if module.is_causal else (Full(cross=True),)
    return tuple(
        one for pattern in patterns for one in request(module, SegmentRequest(pattern, module.n_heads, True, bias=bias))
    )


def check_decoder(module: Any) -> None:
    """Raise if the module is configured in a way its point cannot serve."""
    check_interface(module)
    check_buckets(module)
