"""The place in a module where its forward is kept, and putting another one there, reversibly.

A forward is replaced per instance, as an instance attribute. When accelerate has hooked the module, its hook sits in
``forward`` and calls ``_old_forward`` (accelerate/hooks.py), so the replacement goes there and the hook stays in front.
Hooks may come and go while a patch is in place; the replacement is looked for wherever it is then.

Nothing that is put there may hold the module, or a patched module would live until the cycle collector runs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

SLOTS = ("_old_forward", "forward")


class Replacement:
    """A forward that attnzoo puts in the place of a module's own."""


def active_slot(module: nn.Module) -> str:
    """The attribute that a new forward goes to: behind accelerate's hook if there is one."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def current(module: nn.Module) -> Callable[..., Any] | None:
    """The instance's forward behind any hook; None where that is the forward of the module's class."""
    value = vars(module).get(active_slot(module))
    plain = isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward
    return None if plain else unbound(value)


def is_foreign(module: nn.Module) -> bool:
    """Whether something else than attnzoo has replaced the instance's forward; accelerate's hooks do not count."""
    forward = current(module)
    return forward is not None and not isinstance(forward, Replacement)


def unbound(value: Any) -> Any:
    """The callable object in a bound method, as accelerate's ``unwrap_model`` leaves it; any other value as it is."""
    if isinstance(value, MethodType) and not isinstance(value.__func__, FunctionType):
        return value.__func__
    return value


def put(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Put a forward in the active slot."""
    vars(module)[active_slot(module)] = forward


def take_back(module: nn.Module, replacement: Callable[..., Any], original: Callable[..., Any] | None) -> None:
    """Put the original forward back where the replacement is now.

    Args:
        module: holds the replacement.
        replacement: the forward that leaves.
        original: what :func:`current` gave when the replacement came. None: the forward of the class, which leaves no
            trace in ``forward``.
    """
    slot = next(slot for slot in SLOTS if unbound(vars(module).get(slot)) is replacement)
    if original is not None:
        vars(module)[slot] = original
    elif slot == "forward":
        del vars(module)["forward"]
    else:
        vars(module)[slot] = MethodType(type(module).forward, module)


def runs_on(module: nn.Module) -> torch.device | None:
    """Where accelerate's hook on a module will run it and brings its weights; None without such a hook.

    accelerate has no public way to ask (accelerate/hooks.py: a hook, or several in one, in ``_hf_hook``).
    """
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
