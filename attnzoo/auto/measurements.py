"""Measurements as plain data: a request, a size class, and the outcome of each backend."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch

from attnzoo.spec.patterns import Pattern, power_of_two
from attnzoo.spec.segments import Attention, Request


@dataclass(frozen=True)
class SizeClass:
    """The size of an attention, rounded up to powers of two. ``kv_lens`` has the number of keys of each segment."""

    batch: int
    q_len: int
    kv_lens: tuple[int, ...]

    def __str__(self) -> str:
        return f"batch <= {self.batch}, queries <= {self.q_len}, keys <= {' + '.join(map(str, self.kv_lens))}"


def size_class(attention: Attention) -> SizeClass:
    """Return the size class of an attention."""
    kv_lens = tuple(power_of_two(segment.kv_len) for segment in attention.segments)
    return SizeClass(power_of_two(attention.batch), power_of_two(attention.q_len), kv_lens)


@dataclass(frozen=True)
class Outcome:
    """The outcome of measuring one backend.

    Attributes:
        code: the code that was measured (:func:`attnzoo.auto.environment.code_of`).
        seconds: the median time of a run (forward, or forward and backward). None means no measured time.
        first: the seconds of the first run, including compilation unless the kernel was already compiled.
        kernel: the name of the kernel that ran.
        reason: the reason why there is no measured time. Empty means that ``seconds`` is set.
        wrong: whether the output was wrong, or the run raised an error other than out-of-memory. ``auto`` never selects
            such a backend.
    """

    code: str
    seconds: float | None = None
    first: float = 0.0
    kernel: str = ""
    reason: str = ""
    wrong: bool = False

    @property
    def warm_up(self) -> str:
        """A text with the time of the first run if this run was much slower than the median, else an empty string."""
        is_long = self.seconds is not None and self.first > max(1.0, 3.0 * self.seconds)
        return f"its first run took {format_seconds(self.first)}" if is_long else ""


@dataclass(frozen=True)
class Measurement:
    """The outcomes of all backends for one request and one size class.

    Attributes:
        request: the request as plain data (:func:`to_plain_data`).
        size: the size class of the attention.
        outcomes: the outcomes by backend name.
        where: the module class and the pattern of the first site with this request, as text for users.
    """

    request: Mapping[str, Any]
    size: SizeClass
    outcomes: Mapping[str, Outcome]
    where: str

    @property
    def key(self) -> str:
        """The key of the measurement in the cache."""
        return key_of(self.request, self.size)

    @property
    def mode(self) -> str:
        """``"forward+backward"`` if the request needs gradients, ``"decoding"`` for a module that decodes, else
        ``"forward"``."""
        return str(self.request.get("mode") or mode_of(bool(self.request.get("grad"))))

    def ranking(self) -> list[tuple[float, str]]:
        """Return ``(seconds, backend)`` for every measured time, fastest first."""
        outcomes = self.outcomes.items()
        return sorted((outcome.seconds, name) for name, outcome in outcomes if outcome.seconds is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as plain data for JSON."""
        outcomes = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        return {"where": self.where, "request": self.request, "size": asdict(self.size), "outcomes": outcomes}

    @classmethod
    def from_dict(cls, data: Any) -> Measurement:
        """Create a measurement from the result of :meth:`to_dict`. Raise :class:`ValueError` for invalid data."""
        _check(data, dict, "a measurement")
        for name, kind in (("request", dict), ("size", dict), ("outcomes", dict), ("where", str)):
            _check(data.get(name), kind, name)
        segments = data["request"].get("segments")
        _check(segments, list, "segments")
        for segment in segments:
            _check(segment, dict, "a segment")
        size, lengths = data["size"], data["size"].get("kv_lens")
        _check(lengths, list, "kv_lens")
        for number in (size.get("batch"), size.get("q_len"), *lengths):
            _check(number, int, "a size")
        outcomes = {}
        for name, outcome in data["outcomes"].items():
            _check(outcome, dict, f"the outcome of {name}")
            seconds, first = outcome.get("seconds"), outcome.get("first")
            for number in (first,) if seconds is None else (seconds, first):
                if not isinstance(number, float) or not 0.0 <= number < math.inf:
                    raise ValueError(f"{name}: the field seconds is {number!r}, not a finite float >= 0")
            for field in ("code", "kernel", "reason"):
                _check(outcome.get(field), str, f"{field} of {name}")
            _check(outcome.get("wrong"), bool, f"wrong of {name}")
            outcomes[name] = Outcome(**{field.name: outcome[field.name] for field in fields(Outcome)})
        return cls(data["request"], SizeClass(size["batch"], size["q_len"], tuple(lengths)), outcomes, data["where"])


def _check(value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r:.60}, not of type {kind.__name__}")


def mode_of(grad: bool) -> str:
    """Return ``"forward+backward"`` if ``grad`` is True, else ``"forward"``."""
    return "forward+backward" if grad else "forward"


def to_plain_data(value: Any) -> Any:
    """Return a request as plain data. Pattern offsets are rounded up to powers of two, as in :class:`SizeClass`."""
    if isinstance(value, Pattern):
        return repr(value.coarse)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return [to_plain_data(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain_data(getattr(value, field.name)) for field in fields(value)}
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def key_of(request: Request | Mapping[str, Any], size: SizeClass) -> str:
    """Return the key of a measurement, which is the request and the size class as JSON."""
    plain = to_plain_data(request) if isinstance(request, Request) else request
    return json.dumps([plain, asdict(size)], sort_keys=True)


def format_seconds(seconds: float) -> str:
    """Return the time as text with three digits, in s, ms or us."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1.0:
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"
