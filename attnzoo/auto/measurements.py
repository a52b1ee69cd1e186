"""What was measured, as plain data: which attention, how large, and how each backend did."""

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
    """How large an attention is, each number rounded up to a power of two.

    Attributes:
        batch: samples.
        q_len: queries.
        kv_lens: keys of each segment.
    """

    batch: int
    q_len: int
    kv_lens: tuple[int, ...]

    def __str__(self) -> str:
        return f"batch <= {self.batch}, queries <= {self.q_len}, keys <= {' + '.join(map(str, self.kv_lens))}"


def size_class(attention: Attention) -> SizeClass:
    """The size class of an attention."""
    kv_lens = tuple(power_of_two(segment.kv_len) for segment in attention.segments)
    return SizeClass(power_of_two(attention.batch), power_of_two(attention.q_len), kv_lens)


@dataclass(frozen=True)
class Outcome:
    """How one backend did.

    Attributes:
        code: which code was measured, see :func:`attnzoo.auto.environment.code_of`.
        seconds: the median of one run (forward, or forward and backward); None: not a candidate.
        first: seconds of the first run, compilation included where the process had not compiled for it before.
        kernel: the kernel that ran.
        reason: why it is no candidate; empty if it is.
        wrong: whether it is none because its numbers were wrong or it raised: ``auto`` does not take it then.
    """

    code: str
    seconds: float | None = None
    first: float = 0.0
    kernel: str = ""
    reason: str = ""
    wrong: bool = False

    @property
    def warm_up(self) -> str:
        """What the first run of a process costs, in words, where that is worth knowing (compilation); else empty."""
        notable = self.seconds is not None and self.first > max(1.0, 3.0 * self.seconds)
        return f"its first run took {format_seconds(self.first)}" if notable else ""


@dataclass(frozen=True)
class Measurement:
    """How every backend did at one attention of one size class.

    Attributes:
        request: the request, as :func:`to_plain_data` gives it.
        size: its size class.
        outcomes: by backend name.
        where: at which site it was met first, for people.
    """

    request: Mapping[str, Any]
    size: SizeClass
    outcomes: Mapping[str, Outcome]
    where: str

    @property
    def key(self) -> str:
        """What it is found by."""
        return key_of(self.request, self.size)

    @property
    def mode(self) -> str:
        """``"forward"``, or ``"forward+backward"`` where gradients were asked for."""
        return mode_of(bool(self.request.get("grad")))

    def ranking(self) -> list[tuple[float, str]]:
        """``(seconds, backend)``, fastest first."""
        times = [(one.seconds, name) for name, one in self.outcomes.items() if one.seconds is not None]
        return sorted(times)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        outcomes = {name: asdict(one) for name, one in self.outcomes.items()}
        return {"where": self.where, "request": self.request, "size": asdict(self.size), "outcomes": outcomes}

    @classmethod
    def from_dict(cls, data: Any) -> Measurement:
        """The inverse of :meth:`to_dict`, of data that anybody may have written.

        Raises:
            ValueError: not what :meth:`to_dict` gives; says what is wrong.
        """
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
        for name, one in data["outcomes"].items():
            _check(one, dict, f"the outcome of {name}")
            seconds, first = one.get("seconds"), one.get("first")
            for number in (first,) if seconds is None else (seconds, first):
                if not isinstance(number, float) or not 0.0 <= number < math.inf:
                    raise ValueError(f"seconds of {name}: {number!r}")
            for field in ("code", "kernel", "reason"):
                _check(one.get(field), str, f"{field} of {name}")
            _check(one.get("wrong"), bool, f"wrong of {name}")
            outcomes[name] = Outcome(one["code"], seconds, first, one["kernel"], one["reason"], one["wrong"])
        made = SizeClass(size["batch"], size["q_len"], tuple(lengths))
        return cls(data["request"], made, outcomes, data["where"])


def _check(value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r:.60}, not a {kind.__name__}")


def mode_of(grad: bool) -> str:
    """What a request asks for, in words."""
    return "forward+backward" if grad else "forward"


def to_plain_data(value: Any) -> Any:
    """A request as plain data; what grows with the lengths in its patterns is rounded as the lengths are."""
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
    """What a measurement is found by: the request and the size class as text."""
    told = to_plain_data(request) if isinstance(request, Request) else request
    return json.dumps([told, asdict(size)], sort_keys=True)


def format_seconds(seconds: float) -> str:
    """A time in three digits and a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1.0:
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"
