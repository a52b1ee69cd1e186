"""Functions that replace the forward of one module instance and restore the original forward.

The replacement is an instance attribute. A hook of accelerate is stored in ``forward`` and calls ``_old_forward``
(accelerate/hooks.py). If a module has such a hook, the replacement is stored in ``_old_forward``, so the hook still
runs. A hook may be added or removed while a module is patched, so :func:`take_back` searches both attributes.

A replacement must not reference the module, because a reference cycle would delay the deletion of the module.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

SLOTS = ("_old_forward", "forward")


class Replacement:
    """Base class of the forwards that attnzoo puts into modules.

    Attributes:
        original: the forward that this object replaced. None stands for the forward of the module's class.
    """

    original: Callable[..., Any] | None


def active_slot(module: nn.Module) -> str:
    """Return the attribute for a new forward: ``_old_forward`` under a hook of accelerate, else ``forward``."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def current(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward set on the instance, without accelerate's hook. None means that the class's forward runs."""
    value = vars(module).get(active_slot(module))
    plain = isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward
    return None if plain else unbound(value)


def foreign(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward that code outside attnzoo and accelerate set on the instance, or None if there is none.

    In a patched module, this is the forward that was set before the first patch.
    """
    forward: Any = current(module)
    while isinstance(forward, Replacement):  # a patch with "native" accepts a replaced forward and runs it
        forward = forward.original
    replaced: Callable[..., Any] | None = forward
    return replaced


def is_foreign(module: nn.Module) -> bool:
    """Whether code outside attnzoo and accelerate has replaced the forward of the instance."""
    return foreign(module) is not None


def unbound(value: Any) -> Any:
    """Return ``value`` or, if ``value`` is a bound method of a callable object, this object.

    accelerate's ``unwrap_model`` makes such bound methods. Bound methods of plain functions are returned unchanged.
    """
    if isinstance(value, MethodType) and not isinstance(value.__func__, FunctionType):
        return value.__func__
    return value


def put(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Store a forward in the attribute that :func:`active_slot` returns."""
    vars(module)[active_slot(module)] = forward


def take_back(module: nn.Module, replacement: Callable[..., Any], original: Callable[..., Any] | None) -> None:
    """Put back ``original``, the forward that :func:`current` returned before the replacement.

    None stands for the forward of the class.
    """
    slot = next(slot for slot in SLOTS if unbound(vars(module).get(slot)) is replacement)
    if original is not None:
        vars(module)[slot] = original
    elif slot == "forward":
        del vars(module)["forward"]
    else:
        vars(module)[slot] = MethodType(type(module).forward, module)


def runs_on(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate's hook moves a module's weights, or None without a hook.

    accelerate has no public function for this. ``_hf_hook`` is a hook or a sequence of hooks (accelerate/hooks.py).
    """
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
