"""Every refusal of attnzoo is one of these exceptions.

Messages are written for the person who gets them: they name the argument, what was got and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Stage = Literal["patch", "before the call", "in the call"]

_LONGEST = 399  # characters of a message, as far as shortening what was got can make it so
_FEWEST = 100  # characters that are left of what was got, however long the rest is


def shorten(text: str, most: int = 200) -> str:
    """The text on one line, without its middle where it has more than ``most`` characters."""
    line = " ".join(text.split()) if "\n" in text else text
    if len(line) <= most:
        return line
    tail = most // 4
    return f"{line[: most - tail - 5]} ... {line[-tail:]}"


class AttnzooError(Exception):
    """Base class of every exception attnzoo raises on purpose."""


class InvalidArgumentError(AttnzooError, ValueError):
    """An argument has a value that is not allowed.

    Attributes:
        argument: name of the argument.
        got: what was received, in words; shortened, as it may be the representation of anything.
        allowed: what would have been accepted, in words.
    """

    def __init__(self, argument: str, got: object, allowed: object) -> None:
        self.argument, self.allowed = argument, str(allowed)
        rest = len(f"{argument}: got ; allowed: {allowed}")
        self.got = shorten(str(got), max(_FEWEST, _LONGEST - rest))
        super().__init__(f"{argument}: got {self.got}; allowed: {self.allowed}")


class KeywordRefusedError(InvalidArgumentError):
    """A model's keyword argument changes what its attention gives, and no backend computes that."""


class UnknownNameError(InvalidArgumentError, LookupError):
    """A name is not registered; the message suggests near misses."""

    def __init__(self, argument: str, got: str, allowed: Iterable[str], also: str = "") -> None:
        names = sorted(allowed)
        told = [*map(repr, names), *([f"or {also}"] if also else [])]
        shown = shorten(repr(got), _FEWEST)
        super().__init__(argument, f"{shown}{suggestion(str(got), names)}", ", ".join(told) or "none")


def suggestion(got: str, names: Iterable[str]) -> str:
    """`` (did you mean ...?)`` with the names most alike; empty if none is."""
    folded = {name.casefold(): name for name in names}
    near = [folded[name] for name in difflib.get_close_matches(got.casefold(), folded, n=2, cutoff=0.5)]
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


@dataclass(frozen=True)
class Refusal:
    """One reason why a backend does not take a request.

    Attributes:
        field: what the reason is about, e.g. ``"dtype"`` or ``"dropout"``.
        got: the value the request has.
        allowed: what the backend would take.
    """

    field: str
    got: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.field}: got {self.got}; allowed: {self.allowed}"


class BackendRefusedError(AttnzooError, NotImplementedError):
    """The requested backend cannot run what was requested, and no other backend was used in its place.

    Attributes:
        backend: name of the backend.
        refusals: ``{place: reasons}``; a place is a module's name, or ``"attention"`` for a call of a function.
        alternatives: ``{place: names of the backends that support the same requests}``; a place is missing where these
            are not known.
        stage: when the backend refused: at ``"patch"`` time, ``"before the call"`` of a module (the module has done
            nothing) or ``"in the call"`` (its cache may be filled); None outside of these.
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
            lines.append(f"  {_counted(places)}:")
            lines.extend(f"    {reason}" for reason in reasons)
            if names is not None:
                lines.append(f"    would run there: {', '.join(map(repr, names)) or 'no registered backend'}")
        if remedy:
            lines.append(f"  {remedy}")
        super().__init__("\n".join(lines))

    def at(self, place: str, stage: Stage) -> BackendRefusedError:
        """Return the same error with the stage, and with this place where the error has only ``"attention"``."""

        def name_place(known: str) -> str:
            return place if known == "attention" else known

        refusals = {name_place(known): reasons for known, reasons in self.refusals.items()}
        alternatives = {name_place(known): names for known, names in self.alternatives.items()}
        return BackendRefusedError(self.backend, refusals, alternatives, self.remedy, stage)


def _counted(places: list[str]) -> str:
    """A few places by name, and how many there are."""
    shown = ", ".join(places[:2])
    return shown if len(places) <= 2 else f"{shown} and {len(places) - 2} more alike"


class PatchError(AttnzooError, RuntimeError):
    """A model cannot be patched, or a patch cannot be undone; the model is left as it was."""


class CacheError(AttnzooError, OSError):
    """Measurements cannot be kept or removed; the message says where and why."""


class DriftError(PatchError):
    """A model's code differs from what its adapter was verified against: by version, by subclass or at run time."""


def raise_interrupts(error: BaseException) -> None:
    """A broken package may raise anything, ``SystemExit`` too: that is a reason. A user's Ctrl-C is not."""
    if isinstance(error, KeyboardInterrupt):
        raise error
