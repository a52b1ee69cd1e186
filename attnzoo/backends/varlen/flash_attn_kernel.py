"""The kernels of the ``flash_attn`` package (Dao 2023, arXiv:2307.08691)."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.backends.varlen.kernels import Inputs, Kernel, drift, import_package
from attnzoo.errors import raise_interrupts

_PUBLIC = (
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    *("dropout_p", "softmax_scale", "causal", "window_size"),
)
# The public function hands out lse, but takes none in its backward, which the union of parts needs: there the two
# functions it wraps are called, as the package itself calls them.
_FORWARD, _BACKWARD = "_wrapped_flash_attn_varlen_forward", "_wrapped_flash_attn_varlen_backward"
_PARTS = {
    _FORWARD: (*_PUBLIC[:-1], "window_size_left", "window_size_right", "softcap", "alibi_slopes", "return_softmax"),
    _BACKWARD: (
        *("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"),
        *_PUBLIC[3:-1],
        *("window_size_left", "window_size_right", "softcap", "alibi_slopes", "deterministic", "rng_state"),
    ),
}

# Where the interface keeps the compiled extension (2.7.1 renamed it), and what is called of it.
_EXTENSIONS, _SYMBOLS = ("flash_attn_gpu", "flash_attn_cuda"), ("varlen_fwd", "varlen_bwd")


@cache
def _package() -> tuple[ModuleType | None, str]:
    found, why = import_package("flash_attn.flash_attn_interface", "flash-attn")
    if found is not None:
        why = drift(found, {"flash_attn_varlen_func": _PUBLIC}, "flash_attn") or _symbols_missing(found) or ""
    return (None if why else found), why


def _symbols_missing(interface: Any) -> str | None:
    """Why the functions of the compiled extension, which all others call, cannot be used; or None.

    The extension is a private name of the interface, but whether it is loaded shows nowhere else without a call.
    """
    try:
        extension = next((one for name in _EXTENSIONS if (one := getattr(interface, name, None)) is not None), None)
        if extension is None:
            return f"flash_attn has loaded no compiled extension: none of {', '.join(_EXTENSIONS)}"
        missing = [name for name in _SYMBOLS if not callable(getattr(extension, name, None))]
    except BaseException as error:
        raise_interrupts(error)
        return f"flash_attn's compiled extension does not load: {type(error).__name__}: {error}"
    return f"flash_attn's compiled extension has no {', '.join(missing)}" if missing else None


@cache
def _parts_unavailable() -> str | None:
    found, _ = _package()
    return None if found is None else drift(found, _PARTS, "flash_attn (2.7 is the first known to have it)")


class FlashAttnKernel(Kernel):
    """``flash_attn`` 2: drops softmax weights, too."""

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
        sequences = inputs.sequences
        out, lse, _, state = getattr(_interface(), _FORWARD)(
            *(*inputs[:3], *sequences.cumulative, inputs.dropout, inputs.scale, sequences.causal),
            window_size_left=sequences.left,
            window_size_right=sequences.right,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        return out, lse, state

    @classmethod
    def backward(
        cls, inputs: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, state: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        sequences = inputs.sequences
        grads = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs[:3])
        getattr(_interface(), _BACKWARD)(
            *(grad_out, *inputs[:3], out, lse, *grads),
            *(*sequences.cumulative, inputs.dropout, inputs.scale, sequences.causal),
            window_size_left=sequences.left,
            window_size_right=sequences.right,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=state,
        )
        return grads[0], grads[1], grads[2]


def _interface() -> Any:
    return _package()[0]
