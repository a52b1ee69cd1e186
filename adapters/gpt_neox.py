"""GPT-NeoX and Pythia: causal self-attention with rotary embeddings (Black et al. 2022, arXiv:2204.06745)."""

from __future__ import annotations

from typing import Any

from attnzoo.adapter import Adapter, request_for
from attnzoo.patching.interface import InterfacePoint
from attnzoo.patching.mask_arguments import DECODER_MASK, MaskCheckPoint
from attnzoo.spec.patterns import Causal
from attnzoo.spec.segments import Request, SegmentRequest

_MODULE = "transformers.models.gpt_neox.modeling_gpt_neox"


class ModelMasks(MaskCheckPoint):
    """Patch point that checks the attention mask of the model."""

    cls = f"{_MODULE}:GPTNeoXModel"
    masks = {"attention_mask": DECODER_MASK}


class SelfAttention(InterfacePoint):
    """Patch point of causal self-attention."""

    cls = f"{_MODULE}:GPTNeoXAttention"
    verified = {f"{_MODULE}:GPTNeoXAttention.forward": ("680bb9e237b1e0ff", "0019986976651fef")}
    cache = ("layer_past",)

    def describe(self, module: Any) -> str:
        return "causal"

    def requests(self, module: Any) -> tuple[Request, ...]:
        heads = int(module.config.num_attention_heads)
        return (request_for(module, heads, module.head_size, SegmentRequest(Causal(offset=0), heads)),)

    def dropout(self, module: Any) -> float:
        return float(module.attention_dropout)


GPT_NEOX = Adapter(model_types=("gpt_neox",), versions="5.17 to 5.24", points=(SelfAttention(), ModelMasks()))
