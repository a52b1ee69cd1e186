"""Drift: differences between the functions of a model and the functions that the adapter was verified against.

Drift has four causes: a subclass overrides a method, other code replaced or wrapped a function at run time, the source
of a function cannot be read, or the installed package has different code (another version or edited files).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Literal

from attnzoo.originals.fingerprint import fingerprint, object_at, path_of

Cause = Literal["overridden", "replaced", "unreadable", "changed"]
_CAUSES: tuple[Cause, ...] = ("overridden", "replaced", "unreadable", "changed")  # in the order of messages
# A decorator from these packages, or from the package of the model, counts as part of the original function.
_DECORATING = frozenset({"torch", *sys.stdlib_module_names})


@dataclass(frozen=True)
class Difference:
    """One function that differs from the verified function.

    Attributes:
        path: the path of the function as ``"package.module:Class.method"``.
        cause: the cause of the difference.
        detail: the difference in words, for the message.
    """

    path: str
    cause: Cause
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


def find_drift(verified: Mapping[str, tuple[str, ...]]) -> tuple[Difference, ...]:
    """Return where the current functions differ from ``verified``, a dict ``{"module:Class.method": fingerprints}``."""
    differences = (_difference(path, known) for path, known in verified.items())
    return tuple(difference for difference in differences if difference is not None)


def find_bypassed(cls: type, base: type, verified: Mapping[str, tuple[str, ...]]) -> tuple[Difference, ...]:
    """Return what a patch would bypass: methods that subclass ``cls`` overrides, and wrappers around methods.

    Constructors are omitted, because they run before a patch. Methods of other classes (for example, the model that
    calls the module) are omitted, because these methods still run after a patch.

    ``base`` is the verified class in ``cls.__mro__``. Call this function only if :func:`find_drift` returned nothing.
    """
    names = ["forward"]
    wrappers = []
    for path in verified:
        owner, _, name = path.rpartition(".") if "." in path.partition(":")[2] else ("", "", path)
        if (owner and owner not in map(path_of, base.__mro__)) or name == "__init__":
            continue
        if owner:
            names.append(name)
        wrappers += [
            Difference(path, "replaced", f"wrapped at run time by {_describe(wrapper)}")
            for wrapper in _wrappers(object_at(path))
            if _package(_module(wrapper)) not in {_package(path), *_DECORATING}
        ]
    overrides = [
        Difference(f"{path_of(cls)}.{name}", "overridden", f"overrides {base.__name__}.{name}")
        for name in dict.fromkeys(names)
        if inspect.getattr_static(cls, name, None) is not inspect.getattr_static(base, name, None)
    ]
    return (*overrides, *wrappers)


def drift_message(differences: Sequence[Difference], family: str, versions: str, installed: str) -> str:
    """Return the error message for differences. The message names one cause, one example and the remedy.

    ``family`` lists the model types of the adapter. The adapter was verified against transformers ``versions``, which
    say nothing about the code of other packages.
    """
    cause = next(cause for cause in _CAUSES if any(difference.cause == cause for difference in differences))
    first, *others = (difference for difference in differences if difference.cause == cause)
    example = f"{first} (and {len(others)} more)" if others else str(first)
    adapter = f"the adapter for {family}"
    if cause == "overridden":
        return (
            f"{example}, which {adapter} replaces or relies on; allowed: subclasses that inherit this method. Use "
            "backend 'native', or register an adapter for the subclass"
        )
    if cause == "replaced":
        return (
            f"{example}; allowed: the original function, which {adapter} replaces or relies on. Restore this function, "
            "or use backend 'native'"
        )
    if cause == "unreadable":
        return (
            f"{example}; {adapter} cannot compare it with the verified code. Use the package with "
            "its .py files (frozen and compiled builds lack them), or backend 'native'"
        )
    if (package := _package(first.path)) != "transformers":
        return (
            f"the code of {package} changed since {adapter} was verified: {example}. Read it again, then record "
            "what 'attnzoo fingerprint' prints, or use backend 'native'"
        )
    return (
        f"{adapter} was verified against transformers {versions}; installed is {installed} (or edited). "
        f"Changed: {example}. Use a verified version, or backend 'native'"
    )


def _difference(path: str, known: tuple[str, ...]) -> Difference | None:
    cause: Cause = "changed"
    try:
        function = object_at(path)
    except (ImportError, AttributeError) as error:
        return Difference(path, cause, f"{type(error).__name__}: {error}")
    try:
        got = _fingerprint_at(path, function)
    except (OSError, TypeError) as error:
        cause, detail = "unreadable", str(error)
    else:
        if got in known:
            return None
        detail = f"got fingerprint {got}; allowed: {', '.join(known)}"
    original = inspect.unwrap(function)
    if not _is_defined_at(path, original):
        return Difference(path, "replaced", f"replaced at run time by {_describe(original)}")
    return Difference(path, cause, detail)


@cache
def _fingerprint_at(path: str, function: Callable[..., Any]) -> str:
    return fingerprint(function)


def _package(path: str) -> str:
    return path.partition(":")[0].partition(".")[0]


def _is_defined_at(path: str, function: Any) -> bool:
    """Whether the class or module in the path defines the function. Inherited methods count as defined."""
    module, _, attribute = path.partition(":")
    owner, _, name = attribute.rpartition(".")
    inherited = owner and name not in vars(object_at(f"{module}:{owner}"))
    defined_in = _module(function) if isinstance(function, FunctionType) else getattr(function, "__module__", "")
    named = getattr(function, "__qualname__", None) == attribute
    return bool(inherited or (named and _package(defined_in) == _package(module)))


def _wrappers(function: Any) -> Iterator[Any]:
    """Yield the wrappers of a function, outermost first."""
    original = inspect.unwrap(function)
    while function is not original:
        yield function
        function = function.__wrapped__


def _module(function: Any) -> str:
    """Return the module that contains the code of a function. For other callables, return the module of the class.

    Wrappers copy ``__module__``, so this function reads the globals of ``function`` instead.
    """
    plain = getattr(function, "__func__", function)
    if isinstance(plain, FunctionType):
        return str(plain.__globals__.get("__name__", plain.__module__))
    return type(plain).__module__


def _describe(function: Any) -> str:
    """Describe a callable by the name of its code object, because wrappers copy the names of functions."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return f"an object of type {type(function).__module__}.{type(function).__qualname__}"
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has only the short name
    return f"{name} of module {_module(function)}, line {code.co_firstlineno}"
