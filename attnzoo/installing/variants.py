"""Names for backends with options."""

from __future__ import annotations

import re
from typing import Any

from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError
from attnzoo.registry import registry

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def register_variant(name: str, backend: str, **options: Any) -> Backend:
    """Register a name for a backend with options. The name works wherever a backend name works.

    Examples are ``patch(model, backend=name)`` and, after :func:`attnzoo.install`, ``attn_implementation=name``. If a
    model was loaded with this name, ``save_pretrained`` saves the name. Register the name before loading the model.

    Args:
        name: the new name: letters, digits, ``.``, ``_`` and ``-``.
        backend: the name or alias of a backend.
        options: options of the backend, e.g. ``window=1024``.

    Returns:
        The configured backend, as :func:`attnzoo.configure` returns it.

    Raises:
        InvalidArgumentError: attnzoo or transformers uses the name already, or an option has a wrong value.
        UnknownNameError: the backend or an option is unknown.

    Example:
        >>> import attnzoo
        >>> attnzoo.register_variant("local-1k", "blocked-local", window=1024).window
        1024
        >>> attnzoo.configure("local-1k").window
        1024
        >>> attnzoo.unregister_variant("local-1k")
    """
    from transformers import AttentionInterface

    if not isinstance(name, str) or not _NAME.fullmatch(name):
        # Reserved: "a/b" is a kernel of the hub, "paged|a" is for continuous batching, "a:b=1" is a name with options.
        raise InvalidArgumentError("variant name", repr(name), "letters, digits, '.', '_' and '-'")
    if name in AttentionInterface().valid_keys() and name not in registry.names():
        raise InvalidArgumentError("variant name", f"{name!r}, a name of transformers", "a name that is not used")
    return registry.register_variant(name, registry.configure(backend, **options))


def unregister_variant(name: str) -> None:
    """Remove the name of a variant. Models that are patched with the variant keep it.

    Raises:
        UnknownNameError: no variant has this name.

    Example:
        >>> import attnzoo
        >>> backend = attnzoo.register_variant("local-1k", "blocked-local", window=1024)
        >>> attnzoo.unregister_variant("local-1k")
    """
    registry.unregister_variant(name)
