"""Replace the forward of one module instance, and restore it.

The replacement is an instance attribute. If accelerate has hooked the module, its hook sits in ``forward`` and calls
``_old_forward`` (accelerate/hooks.py). The replacement then goes to ``_old_forward`` and the hook stays in front. Hooks
may come and go while a patch is in place, so both attributes are searched when it is removed.

A replacement must not hold the module, or a patched module would live until the cycle collector runs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

SLOTS = ("_old_forward", "forward")


class Replacement:
    """Base class of the forwards that attnzoo puts into modules."""


def active_slot(module: nn.Module) -> str:
    """Return the attribute for a new forward: the one behind accelerate's hook if there is a hook."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def current(module: nn.Module) -> Callable[..., Any] | None:
    """Return the instance's forward behind any hook, or None if that is the forward of the module's class."""
    value = vars(module).get(active_slot(module))
    plain = isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward
    return None if plain else unbound(value)


def is_foreign(module: nn.Module) -> bool:
    """Whether other code than attnzoo and accelerate's hooks has replaced the instance's forward."""
    forward = current(module)
    return forward is not None and not isinstance(forward, Replacement)


def unbound(value: Any) -> Any:
    """Return the object that a bound method calls, if that is no plain function; any other value unchanged.

    accelerate's ``unwrap_model`` leaves such bound methods.
    """
    if isinstance(value, MethodType) and not isinstance(value.__func__, FunctionType):
        return value.__func__
    return value


def put(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Put a forward into the active slot."""
    vars(module)[active_slot(module)] = forward


def take_back(module: nn.Module, replacement: Callable[..., Any], original: Callable[..., Any] | None) -> None:
    """Restore the forward that :func:`current` returned before the replacement.

    None stands for the forward of the class; the attribute ``forward`` is then deleted.
    """
    slot = next(slot for slot in SLOTS if unbound(vars(module).get(slot)) is replacement)
    if original is not None:
        vars(module)[slot] = original
    elif slot == "forward":
        del vars(module)["forward"]
    else:
        vars(module)[slot] = MethodType(type(module).forward, module)


def runs_on(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate's hook moves the weights of a module, or None without such a hook.

    accelerate has no public function for this. ``_hf_hook`` holds a hook or a sequence of hooks (accelerate/hooks.py).
    """
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
