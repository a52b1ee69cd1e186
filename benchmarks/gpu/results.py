"""The results of an item of the agenda: rows of a shootout, verdicts on numbers, or counts of launches."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from attnzoo.benchmarks.rows import Shootout

OVERRAN = "overran"  # the status of an item that was killed at its own limit


@dataclass(frozen=True)
class Verdict:
    """A verdict on the numbers of a backend, of a model or of a test.

    Attributes:
        what: what was checked.
        status: ``"ok"``, ``"refused"``, ``"red"`` or ``"failed"``, as in :class:`~attnzoo.benchmarks.rows.Row`.
        detail: the reason for a status other than ``"ok"``, or how much was checked.
    """

    what: str
    status: str
    detail: str


@dataclass(frozen=True)
class Call:
    """What one call of an attention module costs the host and the device.

    Attributes:
        family, backend, seq_len, mode: as in :class:`~attnzoo.benchmarks.rows.Row`.
        launches: number of kernels, copies and fills that the call started on the device. None if the profiler sees no
            device.
        synchronisations: how often the host waited for the device.
        device_seconds: sum of the durations of the kernels, copies and fills. None if ``launches`` is None.
        host_seconds: CPU time of the call.
    """

    family: str
    backend: str
    seq_len: int
    mode: str
    launches: int | None
    synchronisations: int
    device_seconds: float | None
    host_seconds: float


class Results(NamedTuple):
    """The results of one item, or of several items together."""

    shootouts: tuple[Shootout, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    calls: tuple[Call, ...] = ()


Keep = Callable[[Results], None]


def write(path: Path, results: Results) -> None:
    """Write results to a JSON file, which is complete at any time. A single shootout is written as by ``bench``."""
    (*shootouts,) = results.shootouts
    data: Any = {"verdicts": [asdict(v) for v in results.verdicts], "calls": [asdict(call) for call in results.calls]}
    if shootouts:
        (shootout,) = shootouts
        data = asdict(shootout)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1) + "\n")
    new.replace(path)


def read(text: str) -> Results:
    """Return the results in a JSON text that :func:`write` wrote."""
    data = json.loads(text)
    if "rows" in data:
        return Results(shootouts=(Shootout.from_json(data),))
    calls = tuple(Call(**call) for call in data["calls"])
    return Results(verdicts=tuple(Verdict(**verdict) for verdict in data["verdicts"]), calls=calls)


def together(parts: Sequence[Results]) -> Results:
    """Return the results of several items as one object."""
    columns = zip(*parts, strict=True)
    return Results(*(tuple(entry for part in column for entry in part) for column in columns))
