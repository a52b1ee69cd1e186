"""Whether attnzoo is installed, for the whole process or for a part of a program, and with which default backend."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What ``install`` or ``installed`` was called with.

    Attributes:
        default: the name of the backend for models that request none, or None.
    """

    default: str | None = None


# What `installed()` set for the code in a `with` block. Other threads have their own context.
scoped: ContextVar[Settings | None] = ContextVar("attnzoo_installed", default=None)


class _Process:
    """What ``install`` set for the whole process."""

    settings: Settings | None = None


process = _Process()


def active_settings() -> Settings | None:
    """Return the settings for the code that is running, or None if attnzoo is not installed for this code."""
    return scoped.get() or process.settings
