"""Which function transforms of PyTorch a call runs under, and which tensors have no values to look at there.

``torch.func`` hands wrapped tensors to the function it transforms. They have no storage, and under ``vmap`` no values
that Python can branch on: one tensor stands for all samples.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

TRANSFORMS = frozenset({"grad", "vmap", "jvp", "functionalize"})

# Private, because nothing public tells. ``autograd.Function.apply`` asks the first one before it refuses to run under
# torch.func. A PyTorch without them looks as if nothing were transformed: what fails there fails in its words.
_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_stack = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", lambda: None)


def transforms_around(tensors: Iterable[object]) -> tuple[str, ...]:
    """The transforms a call on these tensors runs under, outermost first: ``"grad"``, ``"vmap"``, ``"jvp"``, ...

    ``vjp``, ``jacrev``, ``jacfwd`` and ``hessian`` are made of these: a Hessian runs under ``("vmap", "jvp", "grad")``.
    Tensors with tangents (``torch.autograd.forward_ad``) are under ``"jvp"`` without ``torch.func``, too.
    """
    names = tuple(str(level.key().name).lower() for level in _stack() or ()) if _active() else ()
    if "jvp" not in names and any(_has_tangent(tensor) for tensor in tensors):
        return (*names, "jvp")
    return names


def _has_tangent(tensor: object) -> bool:
    return (
        isinstance(tensor, Tensor) and tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None
    )


def readable(tensor: Tensor) -> bool:
    """Whether Python can look at the values of a tensor: not where ``vmap`` made one of many samples."""
    # A sample's tensor hides the dimension that vmap maps over; nothing else changes the number of dimensions.
    return not _active() or torch.func.debug_unwrap(tensor).ndim == tensor.ndim


def holds(condition: Tensor, unknown: bool) -> bool:
    """What a bool tensor of one element says; ``unknown`` where nobody can look at it (see :func:`readable`)."""
    return bool(condition) if readable(condition) else unknown
