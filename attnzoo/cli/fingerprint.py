"""``attnzoo fingerprint``: print fingerprints of the functions that an adapter depends on."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from attnzoo.cli.output import Json, emit
from attnzoo.errors import InvalidArgumentError, suggestion

_EXAMPLE = "transformers.models.gpt_neox.modeling_gpt_neox:GPTNeoXAttention.forward"


def fingerprint(
    paths: Annotated[
        list[str], typer.Argument(metavar="MODULE:FUNCTION", help="For example package.module:Class.method.")
    ],
    json: Json = None,
) -> None:
    """Print the fingerprints that an adapter records. All Python versions give a function the same fingerprint."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: the path of a console script begins with the script's folder
    computed = {path: fingerprint_at(path) for path in paths}
    emit(lambda: computed, lambda: "\n".join(f"{path}  {value}" for path, value in computed.items()), json)


def fingerprint_at(path: str) -> str:
    """Return the fingerprint of the function at ``"package.module:Class.method"``."""
    from attnzoo.originals.fingerprint import fingerprint as compute

    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise InvalidArgumentError("path", f"{path!r}{_with_colon(path)}", f"MODULE:FUNCTION, e.g. {_EXAMPLE}")
    value, where = _import(path, module), module
    for name in attribute.split("."):
        if not hasattr(value, name):
            near = suggestion(name, dir(value))
            raise InvalidArgumentError("path", f"{path!r}, but {where} has no {name!r}{near}", "an existing function")
        value, where = getattr(value, name), f"{where}.{name}"
    try:
        return compute(value)
    except TypeError as error:
        kind = "a class" if isinstance(value, type) else f"an object of type {type(value).__name__}"
        raise InvalidArgumentError("path", f"{path!r}, {kind}", "a function written in Python with def") from error
    except OSError as error:
        raise InvalidArgumentError("path", f"{path!r}, but {error}", "a function whose source is installed") from error


def _import(path: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a module may raise anything when it is imported
        got = f"{path!r}, {_import_problem(module, error)}"
        raise InvalidArgumentError("path", got, "a module that can be imported") from error


def _import_problem(module: str, error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return f"whose module raises {type(error).__name__} when imported"
    missing = error.name or module
    if not f"{module}.".startswith(f"{missing}."):
        return f"which cannot be imported here ({error})"
    parent, _, name = missing.rpartition(".")
    folders = getattr(importlib.import_module(parent), "__path__", []) if parent else None
    # A module of the user has no similar name here. With a lower cutoff, 'yaml' is similar to 'my_model'.
    similar = suggestion(name, (info.name for info in pkgutil.iter_modules(folders)), cutoff=0.8)
    return f"but there is no module {missing!r}{similar}"


def _with_colon(path: str) -> str:
    """Return a suggestion: ``path`` with a colon after its longest importable part. "" if no part can be imported."""
    names = path.strip(":").split(".")
    for length in range(len(names) - 1, 0, -1):
        module = ".".join(names[:length])
        try:
            importlib.import_module(module)
        except Exception:  # importing may raise anything; a shorter part may be a module
            continue
        return f" (did you mean {module + ':' + '.'.join(names[length:])!r}?)"
    return ""
