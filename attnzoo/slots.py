"""The place in a module where its forward is kept, and putting another one there, reversibly.

A forward is replaced per instance, as an instance attribute. When accelerate has hooked the module, its hook sits in
``forward`` and calls ``_old_forward`` (accelerate/hooks.py), so that is where the replacement goes: the hook
stays in front. Hooks may come and go while a patch is in place; the replacement is looked for wherever it is then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_SLOTS = ("_old_forward", "forward")


def active_slot(module: nn.Module) -> str:
    """Where a new forward goes: behind accelerate's hook if there is one."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def current(module: nn.Module) -> Callable[..., Any]:
    """The forward that runs behind any hook."""
    found: Callable[..., Any] = getattr(module, active_slot(module))
    return found


def put(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Put a forward in the active slot."""
    vars(module)[active_slot(module)] = forward


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


def take_back(module: nn.Module, replacement: Callable[..., Any], original: Callable[..., Any]) -> None:
    """Put the original forward back where the replacement is now; the class's own leaves no trace in ``forward``.

    The caller has made sure that the replacement is there.
    """
    slot = next(slot for slot in _SLOTS if vars(module).get(slot) is replacement)
    plain = (
        getattr(original, "__self__", None) is module and getattr(original, "__func__", None) is type(module).forward
    )
    if slot == "forward" and plain:
        del vars(module)["forward"]
    else:
        vars(module)[slot] = original
