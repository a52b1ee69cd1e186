"""The kernels of the package ``flash_attn`` (Dao 2023, arXiv:2307.08691)."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.backends.common.union import Grads
from attnzoo.backends.varlen.kernels import Inputs, PackedKernel, changed_signature, import_package
from attnzoo.errors import raise_interrupts

_PUBLIC = (
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    *("dropout_p", "softmax_scale", "causal", "window_size"),
)
# A union needs a backward with lse as an argument. The backward of the public function has no such argument. So a union
# calls the two functions that the public function wraps.
_FORWARD, _BACKWARD = "_wrapped_flash_attn_varlen_forward", "_wrapped_flash_attn_varlen_backward"
_PARTS = {
    _FORWARD: (*_PUBLIC[:-1], "window_size_left", "window_size_right", "softcap", "alibi_slopes", "return_softmax"),
    _BACKWARD: (
        *("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"),
        *_PUBLIC[3:-1],
        *("window_size_left", "window_size_right", "softcap", "alibi_slopes", "deterministic", "rng_state"),
    ),
}

# The names of the compiled extension in the interface (2.7.1 renamed it), and the functions that it must have.
_EXTENSIONS, _SYMBOLS = ("flash_attn_gpu", "flash_attn_cuda"), ("varlen_fwd", "varlen_bwd")


@cache
def _package() -> tuple[ModuleType | None, str]:
    module, why = import_package("flash_attn.flash_attn_interface", "flash-attn")
    if module is not None:
        expected = {"flash_attn_varlen_func": _PUBLIC}
        why = changed_signature(module, expected, "flash_attn") or _missing_symbols(module) or ""
    return (None if why else module), why


def _missing_symbols(interface: Any) -> str | None:
    """Return why the functions of the compiled extension cannot be used, or None.

    This function reads private names. The only public way to notice a broken extension is to run a kernel.
    """
    try:
        extensions = [getattr(interface, name, None) for name in _EXTENSIONS]
        extension = next((extension for extension in extensions if extension is not None), None)
        if extension is None:
            return f"flash_attn has loaded no compiled extension ({', '.join(_EXTENSIONS)}): reinstall flash-attn"
        missing = [name for name in _SYMBOLS if not callable(getattr(extension, name, None))]
    except BaseException as error:
        raise_interrupts(error)
        return f"flash_attn's compiled extension does not load: {type(error).__name__}: {error}"
    return f"flash_attn's compiled extension has no {', '.join(missing)}" if missing else None


@cache
def _parts_unavailable() -> str | None:
    module, _ = _package()
    whose = "flash_attn (version 2.7 or later is needed)"
    return None if module is None else changed_signature(module, _PARTS, whose)


class FlashAttnKernel(PackedKernel):
    """The kernel of ``flash_attn`` 2. This kernel supports dropout."""

    name: ClassVar[str] = "flash_attn"
    dropout: ClassVar[bool] = True

    @classmethod
    def unavailable(cls) -> str | None:
        return _package()[1] or None

    @classmethod
    def parts_unavailable(cls) -> str | None:
        return _parts_unavailable()

    @classmethod
    def attend(cls, inputs: Inputs) -> Tensor:
        output: Tensor = _interface().flash_attn_varlen_func(
            *(*inputs[:3], *inputs.sequences.cumulative),
            dropout_p=inputs.dropout,
            softmax_scale=inputs.scale,
            causal=inputs.sequences.causal,
            window_size=(inputs.sequences.left, inputs.sequences.right),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return output

    @classmethod
    def forward(cls, inputs: Inputs) -> tuple[Tensor, Tensor, Any]:
        out, lse, _, state = getattr(_interface(), _FORWARD)(*inputs[:3], *_settings(inputs), False)
        return out, lse, state

    @classmethod
    def backward(cls, inputs: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, state: Any) -> Grads:
        grads = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs[:3])
        deterministic = torch.are_deterministic_algorithms_enabled()
        tensors = (grad_out, *inputs[:3], out, lse, *grads)
        getattr(_interface(), _BACKWARD)(*tensors, *_settings(inputs), deterministic, state)
        return grads[0], grads[1], grads[2]


def _settings(inputs: Inputs) -> tuple[Any, ...]:
    """Return the arguments that forward and backward have in common, in the order of ``_PARTS``."""
    sequences, softcap, alibi_slopes = inputs.sequences, 0.0, None
    settings = (inputs.dropout, inputs.scale, sequences.causal, sequences.left, sequences.right, softcap, alibi_slopes)
    return (*sequences.cumulative, *settings)


def _interface() -> Any:
    return _package()[0]
