"""What one types on a command line: a configured backend (``sdpa``, ``blocked-local:window=1024,sinks=4``), a dtype."""

from __future__ import annotations

import torch

from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError
from attnzoo.registry import registry
from attnzoo.spec.segments import FLOATS


def parse(text: str) -> tuple[str, dict[str, int | str]]:
    """The registered name (aliases resolved) and the options; whole numbers are numbers.

    Raises:
        UnknownNameError: no such backend. InvalidArgumentError: an option without a value, or with two.
    """
    name, _, rest = text.partition(":")
    options: dict[str, int | str] = {}
    for item in rest.split(",") if rest else ():
        option, equals, value = (part.strip() for part in item.partition("="))
        if not (option and equals and value):
            raise InvalidArgumentError("backend", repr(text), "a name, or name:option=value,option=value")
        if option in options:
            raise InvalidArgumentError(f"option {option!r} of a backend", f"it twice in {text!r}", "each option once")
        options[option] = int(value) if value.removeprefix("-").isdecimal() else value
    return registry.backend_class(name).name, options


def spell(name: str, options: dict[str, int | str]) -> str:
    """What :func:`parse` takes apart."""
    return f"{name}:{','.join(f'{option}={value}' for option, value in options.items())}" if options else name


def configured(text: str) -> Backend:
    """The backend of that name with these options.

    Raises:
        UnknownNameError, InvalidArgumentError: as :func:`attnzoo.configure`.
    """
    name, options = parse(text)
    return registry.configure(name, **options)


_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def dtype_name(text: str) -> str:
    """torch's name of a dtype that may be typed short (``bf16``); anything else as it is."""
    return _DTYPES.get(text, text)


def named_dtype(text: str) -> torch.dtype:
    """The floating-point dtype of a name.

    Raises:
        InvalidArgumentError: attention is not computed in a dtype of that name.
    """
    names = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    name = dtype_name(text)
    if name not in names:
        raise InvalidArgumentError("dtype", repr(text), ", ".join(names))
    return names[name]
