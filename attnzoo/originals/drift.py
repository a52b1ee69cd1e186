"""Drift: how the functions of a model differ from those its adapter was verified against, and whose change that is.

Four causes need four remedies: a subclass overrides a method, foreign code replaced or wrapped a function at run time,
the source cannot be read, or the package itself has other code (another version, or edited files).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Literal

from attnzoo.originals.fingerprint import fingerprint, locate

Cause = Literal["overridden", "replaced", "unreadable", "changed"]
_CAUSES: tuple[Cause, ...] = ("overridden", "replaced", "unreadable", "changed")  # in the order of reporting
# Beside those of the model's own package, decorators of torch and of the standard library may be part of the original.
_DECORATING = frozenset({"torch", *sys.stdlib_module_names})


@dataclass(frozen=True)
class Difference:
    """One function that is not as it was verified.

    Attributes:
        path: ``"package.module:Class.method"``.
        cause: whose change it is.
        detail: what stands there, and what is known.
    """

    path: str
    cause: Cause
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


def drift(verified: Mapping[str, tuple[str, ...]]) -> tuple[Difference, ...]:
    """The verified functions that are gone or have another fingerprint.

    Args:
        verified: ``{"module:Class.method": known fingerprints}``.
    """
    differences = (_difference(path, known) for path, known in verified.items())
    return tuple(difference for difference in differences if difference is not None)


def bypassed(cls: type, base: type, verified: Mapping[str, tuple[str, ...]]) -> tuple[Difference, ...]:
    """What a patch would bypass although the originals are as verified: overrides in a subclass, and wrappers.

    Constructors do not count, as they have run before a module is patched. Methods of other classes do not either (of
    the model that calls the module): they run as they are.

    Args:
        cls: the class of a module.
        base: the class that was verified, one of ``cls.__mro__``.
        verified: as for :func:`drift`, which finds nothing.
    """
    names = ["forward"]
    wrappers = []
    for path in verified:
        owner, _, name = path.rpartition(".") if "." in path.partition(":")[2] else ("", "", path)
        if (owner and owner not in map(_path, base.__mro__)) or name == "__init__":
            continue
        if owner:
            names.append(name)
        wrappers += [
            Difference(path, "replaced", f"wrapped at run time by {_described(link)}")
            for link in _wrappers(locate(path))
            if _package(_module(link)) not in {_package(path), *_DECORATING}
        ]
    overrides = [
        Difference(f"{_path(cls)}.{name}", "overridden", f"overrides {base.__name__}.{name}")
        for name in dict.fromkeys(names)
        if inspect.getattr_static(cls, name, None) is not inspect.getattr_static(base, name, None)
    ]
    return (*overrides, *wrappers)


def message(differences: Sequence[Difference], family: str, versions: str, installed: str) -> str:
    """What to tell a user about differences: the first cause that applies, an example of it, and what to do.

    Args:
        differences: at least one.
        family: whose adapter it is.
        versions: the transformers versions it was verified against.
        installed: the transformers version at hand.
    """
    cause = next(cause for cause in _CAUSES if any(difference.cause == cause for difference in differences))
    first, *others = (difference for difference in differences if difference.cause == cause)
    example = f"{first} (and {len(others)} more)" if others else str(first)
    adapter = f"the adapter for {family}"
    if cause == "overridden":
        return (
            f"{example}, which {adapter} replaces or relies on; allowed: subclasses that keep it. Leave these modules "
            "to backend 'native', or register an adapter with a point for the subclass"
        )
    if cause == "replaced":
        return (
            f"{example}; allowed: the original, which {adapter} replaces or relies on. Restore it, or use backend "
            "'native'"
        )
    if cause == "unreadable":
        return (
            f"{example}; {adapter} cannot compare it with the code it was verified against. Install the package with "
            "its .py files (frozen and compiled builds lack them), or use backend 'native'"
        )
    return (
        f"{adapter} was verified against transformers {versions}; installed is {installed} (or an edited copy), where "
        f"{example}. Install a verified version, or use backend 'native'"
    )


def _difference(path: str, known: tuple[str, ...]) -> Difference | None:
    """How one function differs from those known."""
    cause: Cause = "changed"
    try:
        function = locate(path)
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
    if not _stands_at(path, original):
        return Difference(path, "replaced", f"replaced at run time by {_described(original)}")
    return Difference(path, cause, detail)


@cache
def _fingerprint_at(path: str, function: Callable[..., Any]) -> str:
    return fingerprint(function)


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _package(path: str) -> str:
    return path.partition(":")[0].partition(".")[0]


def _stands_at(path: str, function: Any) -> bool:
    """Whether a function was defined in this class or module; an inherited method replaces nothing."""
    module, _, attribute = path.partition(":")
    owner, _, name = attribute.rpartition(".")
    inherited = owner and name not in vars(locate(f"{module}:{owner}"))
    defined_in = _module(function) if isinstance(function, FunctionType) else getattr(function, "__module__", "")
    named = getattr(function, "__qualname__", None) == attribute
    return bool(inherited or (named and _package(defined_in) == _package(module)))


def _wrappers(function: Any) -> Iterator[Any]:
    """A function's wrappers, the outermost first."""
    original = inspect.unwrap(function)
    while function is not original:
        yield function
        function = function.__wrapped__


def _module(function: Any) -> str:
    """The module whose code runs. Wrappers copy ``__module__``: a function's globals decide, an object's type."""
    plain = getattr(function, "__func__", function)
    if isinstance(plain, FunctionType):
        return str(plain.__globals__.get("__name__", plain.__module__))
    return type(plain).__module__


def _described(function: Any) -> str:
    """A callable in words. Wrappers copy the name of what they wrap, so the code of a function decides."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return f"an object of type {type(function).__module__}.{type(function).__qualname__}"
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has the short name only
    return f"{name} of module {_module(function)}, line {code.co_firstlineno}"
