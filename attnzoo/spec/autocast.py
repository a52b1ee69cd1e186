"""The state of ``torch.autocast`` on a device."""

from __future__ import annotations

from functools import cache

import torch


def active_autocast(device: str) -> torch.dtype | None:
    """Return the dtype of autocast for a device type, or None if autocast is off.

    Example:
        >>> active_autocast("cpu") is None
        True
    """
    # A compiler warns of caches that it traces. It compiles for devices that have autocast.
    exists = torch.compiler.is_compiling() or _has_autocast(device)
    return torch.get_autocast_dtype(device) if exists and torch.is_autocast_enabled(device) else None


@cache
def _has_autocast(device: str) -> bool:
    """Whether a device type has autocast. ``is_autocast_enabled`` raises for other types, such as meta."""
    return torch.amp.is_autocast_available(device)
