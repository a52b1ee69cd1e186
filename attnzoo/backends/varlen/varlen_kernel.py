"""The FlashAttention kernels that ship inside PyTorch: ``torch.nn.attention.varlen``."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.backends.varlen.kernels import Inputs, Kernel, drift, import_package, parameters

_PUBLIC = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
# The public function hands out lse, but takes none in its backward, which the union of parts needs: there the two
# operators it is made of are called.
_FORWARD, _BACKWARD = "_varlen_attn", "_varlen_attn_backward"
_PARTS = {
    _FORWARD: (*_PUBLIC, "is_causal", "scale", "window_size"),
    _BACKWARD: (
        *("grad_out", "query", "key", "value", "out", "lse", "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
        *("is_causal", "rng_state", "scale", "window_size"),
    ),
}


@cache
def _function() -> tuple[Any, str]:
    module, why = import_package("torch.nn.attention.varlen", "'torch>=2.11'")
    function = getattr(module, "varlen_attn", None)
    if function is None:
        return None, f"torch {torch.__version__} has no torch.nn.attention.varlen.varlen_attn: 2.11 is needed. {why}"
    names = parameters(function)
    lacking = [name for name in (*_PUBLIC, "scale", "window_size") if name not in names]
    if lacking:
        return None, f"torch {torch.__version__}: varlen_attn has no {', '.join(lacking)}: 2.11 is needed"
    # A build without CUDA says so itself; one with CUDA may leave FlashAttention out, and keeps the Python function.
    if torch.version.cuda is not None and not torch.backends.cuda.is_flash_attention_available():
        return None, f"torch {torch.__version__} is built without FlashAttention"
    # Fewer key heads have to be asked for since 2.12, and are taken without being asked before.
    return (partial(function, enable_gqa=True) if "enable_gqa" in names else function), ""


@cache
def _parts_unavailable() -> str | None:
    return drift(torch.ops.torch_attn, _PARTS, f"torch {torch.__version__}")


class VarlenKernel(Kernel):
    """``varlen_attn``; it has no dropout."""

    name: ClassVar[str] = "varlen"

    @classmethod
    def unavailable(cls) -> str | None:
        return _function()[1] or None

    @classmethod
    def parts_unavailable(cls) -> str | None:
        return _parts_unavailable()

    @classmethod
    def attend(cls, inputs: Inputs) -> Tensor:
        sequences = inputs.sequences
        output: Tensor = _function()[0](
            *(*inputs[:3], *sequences.cumulative),
            scale=inputs.scale,
            window_size=(sequences.left, sequences.right),
        )
        return output

    @classmethod
    def forward(cls, inputs: Inputs) -> tuple[Tensor, Tensor, Any]:
        sequences = inputs.sequences
        window = [sequences.left, sequences.right]
        return getattr(torch.ops.torch_attn, _FORWARD)(
            *(*inputs[:3], *sequences.cumulative, sequences.causal, inputs.scale, window)
        )

    @classmethod
    def backward(
        cls, inputs: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, state: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        sequences = inputs.sequences
        window = [sequences.left, sequences.right]
        return getattr(torch.ops.torch_attn, _BACKWARD)(
            *(grad_out, *inputs[:3], out, lse, *sequences.cumulative, sequences.causal, state, inputs.scale, window)
        )
