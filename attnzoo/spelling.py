"""Functions that read backends and dtypes from text, e.g. ``blocked-local:window=1024,sinks=4`` or ``bf16``."""

from __future__ import annotations

import torch

from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError
from attnzoo.registry import registry
from attnzoo.spec.segments import FLOATS

_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parse(text: str) -> tuple[str, dict[str, int | str]]:
    """Return the name and the options in a text. An alias becomes the name of its backend, digits become an int.

    Raises:
        UnknownNameError: the name is not registered.
        InvalidArgumentError: an option has no value, or has two values.

    Example:
        >>> parse("flash"), parse("blocked-local:window=1024,sinks=4")
        (('flash_attention_2', {}), ('blocked-local', {'window': 1024, 'sinks': 4}))
    """
    name, _, rest = text.partition(":")
    options: dict[str, int | str] = {}
    for item in rest.split(",") if rest else ():
        option, equals, value = (part.strip() for part in item.partition("="))
        if not (option and equals and value):
            raise InvalidArgumentError("backend", repr(text), "a backend name, or name:option=value,option=value")
        if option in options:
            raise InvalidArgumentError(f"option {option!r} of a backend", f"two values in {text!r}", "one value")
        options[option] = int(value) if value.removeprefix("-").isdecimal() else value
    cls = registry.backend_class(name)
    return name if name in registry.variants() else cls.name, options


def spell(name: str, options: dict[str, int | str]) -> str:
    """Return the text for which :func:`parse` returns this name and these options."""
    return f"{name}:{','.join(f'{option}={value}' for option, value in options.items())}" if options else name


def configured(text: str) -> Backend:
    """Return the configured backend for a text such as ``blocked-local:window=1024``. Errors: see :func:`parse`."""
    name, options = parse(text)
    return registry.configure(name, **options)


def dtype_name(text: str) -> str:
    """Return torch's dtype name for a short name such as ``bf16``. Return any other text unchanged."""
    return _DTYPES.get(text, text)


def named_dtype(text: str) -> torch.dtype:
    """Return the dtype for a short name or torch's name. Raise :class:`InvalidArgumentError` for any other name."""
    names = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    if dtype_name(text) not in names:
        raise InvalidArgumentError("dtype", repr(text), ", ".join(names))
    return names[dtype_name(text)]
