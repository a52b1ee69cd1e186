"""Names of backends as values of transformers' ``attn_implementation``."""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo import spelling
from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError, UnknownNameError
from attnzoo.patching.plan import BUILT_IN
from attnzoo.registry import registry

PREFIX = "attnzoo/"


@dataclass(frozen=True)
class NamedBackend:
    """A backend and the text that a user typed for it.

    Attributes:
        text: the text without ``attnzoo/``, e.g. ``"sdpa"`` or ``"blocked-local:window=1024"``.
        backend: the configured backend.
        explicit: whether a user chose the backend for this model. If not, the backend is the default of ``install``.
    """

    text: str
    backend: Backend
    explicit: bool = True


def is_ours(text: str) -> bool:
    """Whether a text begins with ``attnzoo/`` or with the name, alias or variant of a backend."""
    return text.startswith(PREFIX) or _is_known(text)


def _is_known(name: str) -> bool:
    return name.partition(":")[0] in registry.names()


def read_name(text: object, explicit: bool = True, argument: str = "attn_implementation") -> NamedBackend:
    """Return the backend for a text: a name, or ``name:option=value,...``, with or without ``attnzoo/``.

    Raises:
        UnknownNameError: no backend has this name, or the backend has no such option.
        InvalidArgumentError: ``text`` is not a string, or a value of an option is not allowed.
    """
    if not isinstance(text, str):
        raise InvalidArgumentError(argument, repr(text), "the name of a backend, e.g. 'sdpa'")
    name = text.removeprefix(PREFIX)
    if name in BUILT_IN:
        return NamedBackend(name, BUILT_IN[name], explicit)
    if not _is_known(name):
        raise UnknownNameError(argument, name, registry.names())
    return NamedBackend(name, spelling.configured(name), explicit)
