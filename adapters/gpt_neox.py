"""GPT-NeoX and Pythia: causal self-attention with rotary embeddings (Black et al. 2022, arXiv:2204.06745)."""

from __future__ import annotations

from typing import Any

from attnzoo.adapter import Adapter, PatchPoint, parameter_of
from attnzoo.patching.companions import companion
from attnzoo.patching.interface import bind_interface, check_interface, wants_probabilities
from attnzoo.patching.mask_arguments import DECODER_MASK, checking
from attnzoo.spec.patterns import Causal
from attnzoo.spec.segments import Request, SegmentRequest

_MASKS = {"attention_mask": DECODER_MASK}
_MODULE = "transformers.models.gpt_neox.modeling_gpt_neox"


def _heads(module: Any) -> int:
    return int(module.config.num_attention_heads)


def _requests(module: Any) -> tuple[Request, ...]:
    parameter, heads, dim = parameter_of(module), _heads(module), module.head_size
    segment = SegmentRequest(Causal(offset=0), heads)
    return (Request(parameter.device.type, parameter.dtype, heads, dim, dim, (segment,)),)


GPT_NEOX = Adapter(
    model_types=("gpt_neox",),
    versions="5.17 to 5.23",
    points=(
        PatchPoint(
            cls=f"{_MODULE}:GPTNeoXAttention",
            bind=bind_interface,
            describe=lambda module: "causal",
            requests=_requests,
            dropout=lambda module: float(module.attention_dropout),
            check=check_interface,
            wants_probabilities=wants_probabilities,
            verified={f"{_MODULE}:GPTNeoXAttention.forward": ("680bb9e237b1e0ff", "0019986976651fef")},
        ),
        companion(f"{_MODULE}:GPTNeoXModel", checking(lambda module: _MASKS), {}, "checks masks"),
    ),
)
