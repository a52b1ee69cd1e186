"""LongT5's decoder: causal self-attention with a relative bias, and cross-attention, both with caches.

A patched module runs its original forward with another attention function. The original bias is a tensor as large as
the scores. A patch replaces this tensor by a small :class:`~attnzoo.spec.bias.RelativeBias`, and the original forward
passes this object to the other attention function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend, Forward, request_for
from attnzoo.adapters.longt5_bias import TABLE, check_buckets, side_reach, trains_bias, values_by_distance
from attnzoo.adapters.longt5_blocks import MODULE
from attnzoo.patching.interface import InterfacePoint, attend_read, read_interface_mask
from attnzoo.spec.bias import Bias, DenseBias, RelativeBias
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Request, SegmentRequest

STACK_FINGERPRINTS: dict[str, tuple[str, ...]] = {
    f"{MODULE}:LongT5Stack.forward": ("500d61b6a9e97b7d", "cb3fabdcccfcb71a"),
    f"{MODULE}:LongT5Block.forward": ("fc0a577f7b4979e7", "3a754157391568ff"),
}
_NO_BIAS = object()  # stands for no bias; if the bias is None, the original forward builds a tensor of zeros


class DecoderSelfAttention(InterfacePoint):
    """Patch point of causal self-attention with a relative bias."""

    cls = f"{MODULE}:LongT5Attention"
    shared_in = f"{MODULE}:LongT5Stack"
    verified = {
        **STACK_FINGERPRINTS,
        f"{MODULE}:LongT5Attention.forward": ("bc4d27e2ffcb970f", "a5af2d5fb275b237"),
        f"{MODULE}:LongT5Attention.compute_bias": ("0ffa4b1ad6bfc683",),
        f"{MODULE}:LongT5Attention._relative_position_bucket": ("fdeaabc98f494585",),
        f"{MODULE}:LongT5LayerSelfAttention.forward": ("e6450811d6dcddc9", "f68170fc9bbe473d"),
        f"{MODULE}:LongT5LayerCrossAttention.forward": ("56937a3257c398b4", "16722bfb22fdb319"),
        f"{MODULE}:eager_attention_forward": ("cbe822ba4dc3de42",),
    }

    def serves(self, module: Any) -> bool:
        return bool(module.is_causal)

    def describe(self, module: Any) -> str:
        return "masked, relative bias"

    def requests(self, module: Any) -> tuple[Request, ...]:
        heads, dim = module.n_heads, module.key_value_proj_dim
        segments = [SegmentRequest(pattern, heads, True, bias="relative") for pattern in (Causal(offset=0), Full())]
        return tuple(request_for(module, heads, dim, segment) for segment in segments)

    def trains_bias(self, module: Any) -> bool:
        return trains_bias(module, TABLE)

    def dropout(self, module: Any) -> float:
        return float(module.dropout)

    def original_serves(
        self,
        module: Any,
        hidden_states: Tensor,
        mask: Any = None,
        key_value_states: Any = None,
        position_bias: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        # A patched layer passes one value per distance to the later layers. The original needs one value per score.
        return position_bias is None or position_bias.ndim != 2

    def wants_probabilities(self, module: Any, kwargs: Mapping[str, Any]) -> bool:
        return bool(kwargs.get("output_attentions"))  # LongT5Stack has replaced None by the config's value

    def check(self, module: Any) -> None:
        super().check(module)
        check_buckets(module)

    def bind(self, cls: Any, attend: Attend) -> Forward:
        run = self.bind_interface(cls, attend)

        def forward(
            module: Any,
            hidden_states: Tensor,
            mask: Tensor | None = None,
            key_value_states: Tensor | None = None,
            position_bias: Tensor | None = None,
            cache: Any = None,
            *,
            past_key_values: Any = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            cache = past_key_values if cache is None else cache  # the name before transformers 5.24
            values = position_bias
            bias: Any = position_bias
            if position_bias is None and not module.has_relative_attention_bias:
                bias = _NO_BIAS
            elif position_bias is None and attend.complete:
                values = values_by_distance(module, TABLE, side_reach(module))
            if values is not None and values.ndim == 2:
                seen = 0 if cache is None else int(cache.get_seq_length(module.layer_idx))
                bias = RelativeBias(values, zero=side_reach(module), offset=seen)
            output, bias, weights = run(module, hidden_states, mask, key_value_states, bias, cache, **kwargs)
            # The next layer gets values, a tensor or None, but never an object that this forward made.
            return output, values if bias is _NO_BIAS or isinstance(bias, Bias) else bias, weights

        return forward

    def compute(  # type: ignore[override]
        self,
        module: Any,
        attend: Attend,
        implementation: str,
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
        """Compute attention as the base class does, with a bias.

        ``position_bias`` is the original bias tensor, or the object by which :meth:`bind` has replaced it.
        """
        bias = DenseBias(position_bias) if isinstance(position_bias, Tensor) else position_bias
        bias = None if bias is _NO_BIAS else bias
        read = read_interface_mask(attend, implementation, query, key, attention_mask, module.is_causal)
        if read.bias is not None:
            bias = read.bias if bias is None else _sum(query, key, bias, read.bias)
        pattern = Full(cross=not module.is_causal) if isinstance(read.pattern, Full) else read.pattern
        read = read._replace(pattern=pattern, bias=bias)
        return attend_read(attend, read, query, key, value, scaling, dropout, output_attentions)

    def original_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, "position_bias": None} if kwargs["position_bias"] is _NO_BIAS else kwargs


class DecoderCrossAttention(DecoderSelfAttention):
    """Patch point of cross-attention, which has no learned bias. The mask of the encoder's tokens may be additive."""

    def serves(self, module: Any) -> bool:
        return not module.is_causal

    def describe(self, module: Any) -> str:
        return "masked (cross)"

    def requests(self, module: Any) -> tuple[Request, ...]:
        segment = SegmentRequest(Full(cross=True), module.n_heads, key_mask=True)
        return (request_for(module, module.n_heads, module.key_value_proj_dim, segment),)


def _sum(query: Tensor, key: Tensor, bias: Bias, rest: DenseBias) -> DenseBias:
    """Return the sum of ``bias`` and ``rest``, which is the user's additive mask."""
    q_len, kv_len = query.shape[2], key.shape[2]
    rows, columns = (torch.arange(n, device=query.device) for n in (q_len, kv_len))
    dense = bias.block(rows, columns, q_len, kv_len)
    return DenseBias(rest.values + dense)
