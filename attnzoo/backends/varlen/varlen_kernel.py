"""PyTorch's FlashAttention kernels (``torch.nn.attention.varlen``). Copy this file to add a GPU kernel.

A kernel class has three main methods. ``attend`` calls the public function of the kernel. ``forward`` returns ``(out,
lse, state)`` for a part of the keys. ``backward`` gets this state, and the out and lse of the whole union. Class
attributes declare what the kernel supports. ``unavailable`` returns why the kernel cannot run on this machine.
:mod:`attnzoo.backends.varlen.packed` plans the calls, packs the rows, hides keys and merges the parts.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.backends.common.union import Grads
from attnzoo.backends.varlen.kernels import Inputs, PackedKernel, changed_signature, import_package, parameters

_PUBLIC = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
# A union needs a backward with lse as an argument. The backward of the public function has no such argument. So a union
# calls the two operators that the public function wraps.
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
        return None, f"torch {torch.__version__} has no varlen_attn: install torch>=2.11. {why}"
    names = parameters(function)
    missing = [name for name in (*_PUBLIC, "scale", "window_size") if name not in names]
    if missing:
        return None, f"torch {torch.__version__}: varlen_attn has no {', '.join(missing)}: install torch>=2.11"
    # A build with CUDA may lack FlashAttention and still have the Python function.
    if torch.version.cuda is not None and not torch.backends.cuda.is_flash_attention_available():
        return (
            None,
            f"torch {torch.__version__} is built without FlashAttention: install a build of torch with FlashAttention",
        )
    # Grouped key heads need enable_gqa=True since torch 2.12. Earlier versions lack this argument.
    return (partial(function, enable_gqa=True) if "enable_gqa" in names else function), ""


@cache
def _parts_unavailable() -> str | None:
    return changed_signature(torch.ops.torch_attn, _PARTS, f"torch {torch.__version__}")


class VarlenKernel(PackedKernel):
    """The kernel ``varlen_attn`` of PyTorch. This kernel does not support dropout."""

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
            *(*inputs[:3], *sequences.cumulative), scale=inputs.scale, window_size=(sequences.left, sequences.right)
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
    def backward(cls, inputs: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, state: Any) -> Grads:
        sequences = inputs.sequences
        window = [sequences.left, sequences.right]
        return getattr(torch.ops.torch_attn, _BACKWARD)(
            *(grad_out, *inputs[:3], out, lse, *sequences.cumulative, sequences.causal, state, inputs.scale, window)
        )
