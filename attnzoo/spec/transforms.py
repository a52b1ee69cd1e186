"""The function transforms of PyTorch around a call, and tensors whose values Python cannot read there.

``torch.func`` passes wrapped tensors to the function it transforms. They have no storage. Under ``vmap`` one tensor
stands for all samples, so Python cannot branch on its values.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

TRANSFORMS = frozenset({"grad", "vmap", "jvp", "functionalize"})

# Private functions, because PyTorch has no public ones. ``autograd.Function.apply`` calls the first before it refuses
# to run under torch.func. If a PyTorch version lacks them, calls look untransformed and fail with PyTorch's own errors.
_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_stack = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", lambda: None)


def transforms_around(tensors: Iterable[object]) -> tuple[str, ...]:
    """Return the transforms that a call on these tensors runs under, outermost first: ``"grad"``, ``"vmap"``, ...

    ``vjp``, ``jacrev``, ``jacfwd`` and ``hessian`` consist of these: a Hessian runs under ``("vmap", "jvp", "grad")``.
    Tensors with tangents (``torch.autograd.forward_ad``) count as ``"jvp"`` even without ``torch.func``.
    """
    names = tuple(str(level.key().name).lower() for level in _stack() or ()) if _active() else ()
    if "jvp" not in names and any(map(_has_tangent, tensors)):
        return (*names, "jvp")
    return names


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and forward_ad.unpack_dual(value).tangent is not None


def readable(tensor: Tensor) -> bool:
    """Whether Python can read the values of a tensor: False if ``vmap`` maps over it."""
    # Such a tensor hides the dimension that vmap maps over; nothing else changes the number of dimensions.
    return not _active() or torch.func.debug_unwrap(tensor).ndim == tensor.ndim


def holds(condition: Tensor, unknown: bool) -> bool:
    """Return the value of a bool tensor of one element; ``unknown`` if Python cannot read it (:func:`readable`)."""
    return bool(condition) if readable(condition) else unknown
