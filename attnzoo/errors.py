"""The exceptions of attnzoo, and the form of their messages.

Every message names argument, given value and allowed values: ``argument: got X; allowed: Y`` (:func:`got_and_allowed`).

The message of a refusal is built in three steps. :meth:`Capabilities.refusals <attnzoo.backend.Capabilities.refusals>`
and the ``refusals`` methods of backends choose the texts of each :class:`Refusal`. ``Refusal.__str__`` writes one line.
:class:`BackendRefusedError` joins the lines of all modules and adds the backends that support the request.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Stage = Literal["patch", "before the call", "in the call"]

_LONGEST_MESSAGE = 399  # characters; a longer message gets a shorter "got" part
_SHORTEST_GOT = 100  # characters; the "got" part is never shortened below this length


def shorten(text: str, most: int = 200) -> str:
    """Return the text on one line. In a text of more than ``most`` characters, `` ... `` replaces the middle."""
    line = " ".join(text.split()) if "\n" in text else text
    if len(line) <= most:
        return line
    tail = most // 4
    return f"{line[: most - tail - 5]} ... {line[-tail:]}"


def got_and_allowed(argument: str, got: object, allowed: object) -> str:
    """Return a message of the form ``argument: got X; allowed: Y``."""
    return f"{argument}: got {got}; allowed: {allowed}"


class AttnzooError(Exception):
    """Base class of every exception that attnzoo raises on purpose."""


class InvalidArgumentError(AttnzooError, ValueError):
    """An argument has a value that is not allowed.

    Attributes:
        argument: the name of the argument.
        got: a short description of the given value.
        allowed: a description of the allowed values.
    """

    def __init__(self, argument: str, got: object, allowed: object) -> None:
        self.argument, self.allowed = argument, str(allowed)
        rest = len(got_and_allowed(argument, "", allowed))
        self.got = shorten(str(got), max(_SHORTEST_GOT, _LONGEST_MESSAGE - rest))
        super().__init__(got_and_allowed(argument, self.got, self.allowed))


class KeywordRefusedError(InvalidArgumentError):
    """No backend can compute the effect that a keyword argument of a model has on attention."""


class UnknownNameError(InvalidArgumentError, LookupError):
    """A name is not registered. The message lists the registered names and suggests similar ones."""

    def __init__(self, argument: str, got: object, allowed: Iterable[str], also: str = "") -> None:
        names = sorted(allowed)
        listed = [*map(repr, names), *([f"or {also}"] if also else [])]
        name = shorten(repr(got), _SHORTEST_GOT)
        super().__init__(argument, f"{name}{suggestion(str(got), names)}", ", ".join(listed) or "none")


def unusable_backend(name: object, names: set[str], reserved: Iterable[str]) -> InvalidArgumentError:
    """Return the error for a name that is no backend: a reserved name, a name with options, or an unknown name.

    ``names`` are all names that users may type, which include ``reserved``.
    """
    usable = names - set(reserved)
    text = name if isinstance(name, str) else ""  # comparing an array with a name would raise
    if text in names - usable:
        listed = ", ".join(map(repr, sorted(usable)))
        return InvalidArgumentError("backend", f"{text!r}, which is not accepted by this function", listed)
    first, _, options = text.partition(":")
    if options and first in usable:
        allowed = f"{first!r}, and options as keyword arguments: {options.replace(',', ', ')}"
        return InvalidArgumentError("backend", repr(text), allowed)
    return UnknownNameError("backend", name, names)


def suggestion(got: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """Return `` (did you mean ...?)`` with up to two similar names, or ``""`` if no name is similar.

    ``cutoff`` is the least similarity, from 0 to 1 (equal names), as of :func:`difflib.get_close_matches`.
    """
    folded = {name.casefold(): name for name in names}
    near = [folded[name] for name in difflib.get_close_matches(got.casefold(), folded, n=2, cutoff=cutoff)]
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


@dataclass(frozen=True)
class Refusal:
    """One reason why a backend does not support a request.

    Attributes:
        field: the refused property of the request, e.g. ``"dtype"`` or ``"dropout"``.
        got: the value of the property in the request.
        allowed: the values that the backend supports.

    Example:
        >>> print(Refusal("bias", "relative", "none"))
        bias: got relative; allowed: none
    """

    field: str
    got: str
    allowed: str

    def __str__(self) -> str:
        return got_and_allowed(self.field, self.got, self.allowed)


class BackendRefusedError(AttnzooError, NotImplementedError):
    """The requested backend cannot run a request, and attnzoo tried no other backend.

    Attributes:
        backend: the name of the backend.
        refusals: ``{place: reasons}``. A place is the name of a module, or ``"attention"`` for a call of a function.
        alternatives: ``{place: names of backends that support the requests}``, if attnzoo has determined these names.
        stage: the time of the refusal: ``"patch"``, ``"before the call"`` of a module (nothing has changed yet) or
            ``"in the call"`` (the KV cache may already contain the new tokens). None means any other time.
    """

    def __init__(
        self,
        backend: str,
        refusals: Mapping[str, tuple[Refusal, ...]],
        alternatives: Mapping[str, tuple[str, ...]],
        remedy: str = "",
        stage: Stage | None = None,
    ) -> None:
        self.backend, self.refusals, self.alternatives = backend, dict(refusals), dict(alternatives)
        self.remedy, self.stage = remedy, stage
        when = "" if stage is None else " at patch time" if stage == "patch" else f" {stage}"
        lines = [f"backend {backend!r} refuses{when}"]
        groups: dict[tuple[tuple[Refusal, ...], tuple[str, ...] | None], list[str]] = {}
        for place, reasons in self.refusals.items():
            others = tuple(self.alternatives[place]) if place in self.alternatives else None
            groups.setdefault((tuple(reasons), others), []).append(place)
        for (reasons, names), places in groups.items():
            lines.append(f"  {_first_places(places)}:")
            lines.extend(f"    {reason}" for reason in reasons)
            if names is not None:
                lines.append(f"    backends that support it: {', '.join(map(repr, names)) or 'none'}")
        super().__init__("\n".join([*lines, f"  {remedy}"] if remedy else lines))

    def at(self, place: str, stage: Stage) -> BackendRefusedError:
        """Return a copy of the error with this ``stage``, in which ``place`` replaces the place ``"attention"``."""
        refusals = {place if known == "attention" else known: reasons for known, reasons in self.refusals.items()}
        alternatives = {place if known == "attention" else known: names for known, names in self.alternatives.items()}
        return BackendRefusedError(self.backend, refusals, alternatives, self.remedy, stage)


def _first_places(places: list[str]) -> str:
    shown = ", ".join(places[:2])
    return shown if len(places) <= 2 else f"{shown} and {len(places) - 2} more alike"


class PatchError(AttnzooError, RuntimeError):
    """A model cannot be patched, or a patch cannot be removed. The model is unchanged."""


class CacheError(AttnzooError, OSError):
    """Measurements cannot be saved or removed. The message names the file and the reason."""


class DriftError(PatchError):
    """The code of a model differs from the code that the adapter was verified against."""


def raise_interrupts(error: BaseException) -> None:
    """Raise ``error`` again if the user pressed Ctrl-C. The caller reports all other errors, even ``SystemExit``."""
    if isinstance(error, KeyboardInterrupt):
        raise error
