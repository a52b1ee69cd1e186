"""Functions that find active ``torch.func`` transforms, and tensors whose values Python cannot read.

``torch.func`` passes wrapped tensors without storage to the transformed function. Under ``vmap`` one tensor represents
all samples, so Python cannot branch on the values of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

TRANSFORMS = frozenset({"grad", "vmap", "jvp", "functionalize"})

# PyTorch has no public functions for this purpose. If a PyTorch version lacks these private functions, attnzoo finds no
# transforms, and PyTorch raises an error in a transformed call.
_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_stack = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", lambda: None)


def transforms_around(tensors: Iterable[object]) -> tuple[str, ...]:
    """Return the names of the transforms that are active in a call on these tensors, outermost first.

    A transform that combines others counts as all of them. For example, the result inside ``hessian`` is
    ``("vmap", "jvp", "grad")``. Tensors with tangents (``torch.autograd.forward_ad``) count as ``"jvp"`` even
    without ``torch.func``.
    """
    if not _active():
        # Outside a level of forward_ad, tensors have no tangents. This check is fast, and each attention calls this
        # function several times.
        may_have_tangents = getattr(forward_ad, "_current_level", 0) >= 0
        return ("jvp",) if may_have_tangents and any(map(_has_tangent, tensors)) else ()
    names = tuple(str(level.key().name).lower() for level in _stack() or ())
    if "jvp" not in names and any(map(_has_tangent, tensors)):
        return (*names, "jvp")
    return names


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and forward_ad.unpack_dual(value).tangent is not None


def readable(tensor: Tensor) -> bool:
    """Whether Python can read the values of a tensor.

    The result is False if ``vmap`` maps over the tensor, or if ``torch.compile`` or ``torch.export`` traces the code.
    """
    if torch.compiler.is_compiling():
        return False
    # vmap hides the dimension that it maps over. No other transform changes the number of dimensions.
    return not _active() or torch.func.debug_unwrap(tensor).ndim == tensor.ndim


def readable_at_once(tensor: Tensor) -> bool:
    """Whether Python can read the values of a tensor without waiting for a device.

    Reading from a device stops the host until the device has computed everything before, and cannot be captured in a
    CUDA graph. So what only saves work, e.g. dropping a mask that hides nothing, is done on the CPU alone.
    """
    return tensor.device.type == "cpu" and readable(tensor)


def hides_nothing(visible: Tensor) -> bool:
    """Whether a bool mask is known to be True everywhere. On a device, this is never known."""
    return readable_at_once(visible) and bool(visible.all())


def holds(condition: Tensor, unknown: bool) -> bool:
    """Return the value of a one-element bool tensor, or ``unknown`` if Python cannot read the value."""
    return bool(condition) if readable(condition) else unknown
