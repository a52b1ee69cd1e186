"""The backend ``triton``: one kernel for the softmax over all segments, with exact gradients, on CUDA.

The kernels compute windows, chunks and causality from a few numbers, and visit only tiles that may be visible. They
read queries, keys and values in the layout of models. The backward computes scores and softmax weights again.

Triton comes with PyTorch's CUDA builds. With ``TRITON_INTERPRET=1`` in the environment, Triton runs kernels in numpy,
on CPU tensors. This is slow and meant for tests. The backend then supports the device ``cpu`` instead of ``cuda``, and
not bfloat16, because the interpreter's matrix products of bfloat16 are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import ClassVar

import torch

from attnzoo.backend import Backend, Capabilities
from attnzoo.backends.triton.availability import why_unusable
from attnzoo.backends.triton.tile_sizes import is_interpreted
from attnzoo.backends.varlen.kernels import no_device
from attnzoo.errors import BackendRefusedError, Refusal
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Request, Result

_LARGEST_DIM = 256

_ON_CUDA = Capabilities(
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    patterns=frozenset({Full, Causal, Window, Chunks, SortedChunks, HashedChunks}),
    segments=1 << 16,
    key_mask=True,
    mask=True,
    bias=frozenset({"relative", "dense"}),
    bias_grad=True,
    gqa=True,
    uneven_value_dim=True,
    dropout=True,
    grad=True,
    softcap=True,
)
_INTERPRETED = replace(_ON_CUDA, devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32, torch.float16}))


@dataclass(frozen=True)
class TritonBackend(Backend):
    """Triton kernels for any segments, masks and biases, forward and backward."""

    name: ClassVar[str] = "triton"
    priority: ClassVar[int] = -90 if is_interpreted() else 8
    compiles: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = _INTERPRETED if is_interpreted() else _ON_CUDA

    @classmethod
    def unavailable(cls) -> str | None:
        if find_spec("triton") is None:
            return "the package triton is not installed; PyTorch's CUDA builds for Linux contain triton"
        return why_unusable("cpu") if is_interpreted() else no_device() or why_unusable("cuda")

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        refusals = super().refusals(request)
        for name, dim in (("head_dim", request.head_dim), ("value_dim", request.value_dim)):
            if dim > _LARGEST_DIM:
                refusals += (Refusal(name, str(dim), f"at most {_LARGEST_DIM}"),)
        if any(s.bias is not None and isinstance(s.pattern, SortedChunks | HashedChunks) for s in request.segments):
            refusals += (Refusal("bias", "a bias with SortedChunks or HashedChunks", "no bias with these patterns"),)
        return refusals

    def priority_for(self, request: Request) -> int:
        """Return a priority above PyTorch's kernels, unless a single call of PyTorch's kernels computes the request.

        The priority is below FlashAttention's, because these kernels have not run on a card yet.
        """
        (first, *others) = request.segments
        is_plain = not others and first.bias is None and not first.mask and isinstance(first.pattern, Full | Causal)
        return self.priority if is_plain or is_interpreted() else 15

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        # Not every machine has Triton, and the registry imports this module on all of them.
        from attnzoo.backends.triton.attend import attend

        check_biases(attention)
        return Result(attend(attention), self.name)


def check_biases(attention: Attention) -> None:
    """Raise if a bias has an unknown class, because the kernels ignore overridden methods."""
    for segment in attention.segments:
        if segment.bias is not None and type(segment.bias) not in (RelativeBias, DenseBias):
            reason = Refusal("bias", type(segment.bias).__name__, "RelativeBias or DenseBias itself, no subclass")
            raise BackendRefusedError(TritonBackend.name, {"attention": (reason,)}, {})
