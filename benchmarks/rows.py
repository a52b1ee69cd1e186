"""What does a shootout record? Rows, end-to-end verdicts, and the JSON file that stores them."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SCHEMA = 1
OK, REFUSED, SKIPPED, RED, FAILED = "ok", "refused", "skipped", "red", "failed"
ORIGINAL = "native"


class Problem(Exception):
    """Why a row cannot be measured: ``status`` (one of the constants above, not ``OK``) and ``reason`` in words."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Row:
    """The result of one contender in one case. It has times only if ``status`` is ``"ok"``.

    Attributes:
        family, scope, seq_len, batch, dtype, device, threads, mode: as in :class:`~attnzoo.benchmarks.cases.Case`.
        checkpoint: the checkpoint whose configuration the family has.
        backend: the requested backend, with its options; ``"native"`` is the original.
        kernel: the kernels that ran; None if none ran.
        versions: versions and hardware.
        status: ``"ok"``, ``"refused"`` (the backend does not support the case), ``"skipped"`` (left out), ``"red"``
            (wrong numbers, or another kernel than requested) or ``"failed"`` (an exception).
        reason: explains every status except ``"ok"``.
        seconds: median of the timed runs.
        fastest, slowest: their range.
        runs: seconds of every timed run, in order.
        speedup: the original's median divided by this row's; above 1 is faster.
        peak_bytes: memory that the first run in a fresh process needs in addition to weights and inputs.
        peak_ratio: this row's ``peak_bytes`` divided by the original's; below 1 is less.
        before_bytes: memory in use before that run.
        memory_method: how the peak was measured.
        error: largest absolute difference from the float64 oracle, of the check that is closest to its budget.
        budget: error budget of that check.
        worst: what that check compared.
        checks: number of checks.
        recall: for a backend that changes the pattern: the share of full attention's weight on the keys that it sees,
            mean over heads and checked query rows.
        peer: whether the contender is a peer. Nothing checks its numbers, and its status never fails the shootout.
        note: differences from the published configuration; empty if there are none.
    """

    family: str
    checkpoint: str
    scope: str
    backend: str
    seq_len: int
    batch: int
    dtype: str
    device: str
    threads: int
    mode: str
    versions: dict[str, str]
    status: str = OK
    reason: str = ""
    kernel: str | None = None
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    runs: tuple[float, ...] = ()
    speedup: float | None = None
    peak_bytes: int | None = None
    peak_ratio: float | None = None
    before_bytes: int | None = None
    memory_method: str | None = None
    error: float | None = None
    budget: float | None = None
    worst: str | None = None
    checks: int = 0
    recall: float | None = None
    peer: bool = False
    note: str = ""

    @property
    def is_original(self) -> bool:
        """Whether the row is the unpatched model."""
        return self.backend == ORIGINAL

    @property
    def label(self) -> str:
        """The backend's name for readers."""
        return "original" if self.is_original else self.backend

    @property
    def kernel_label(self) -> str:
        """The kernel's name for readers, ``"-"`` if no kernel ran."""
        return (self.kernel or "-").removeprefix("original ")

    @property
    def hardware(self) -> str:
        """The device that computed the row, for readers."""
        return self.versions["gpu"] if self.device == "cuda" else f"{self.versions['cpu']}, {self.threads} thread(s)"

    def with_times(self, runs: tuple[float, ...]) -> Row:
        """Return the row with the seconds of its timed runs."""
        return replace(self, runs=runs, seconds=statistics.median(runs), fastest=min(runs), slowest=max(runs))

    def without_measurements(self, status: str, reason: str) -> Row:
        """Return the row with this status and neither times nor memory: they do not belong to the requested backend."""
        return replace(
            self, status=status, reason=reason, runs=(), seconds=None, fastest=None, slowest=None, speedup=None,
            peak_bytes=None, peak_ratio=None, before_bytes=None, memory_method=None,
        )  # fmt: skip

    def compared_with(self, original: Row | None) -> Row:
        """Return the row with its ratios to the original's row of the same case."""
        if original is None or original.status != OK or self.status != OK:
            return self
        speedup = original.seconds / self.seconds if original.seconds and self.seconds else None
        ratio = self.peak_bytes / original.peak_bytes if original.peak_bytes and self.peak_bytes is not None else None
        return replace(self, speedup=speedup, peak_ratio=ratio)


@dataclass(frozen=True)
class EndToEnd:
    """The verdict of :func:`attnzoo.verify` on a backend, for a whole one-layer model of the family.

    Attributes:
        status: as in :class:`Row`.
        report: the text of the report, or the reason why there is none.
        gradients: whether gradients were compared too; None in result files older than this field.
    """

    family: str
    backend: str
    seq_len: int
    status: str
    report: str
    gradients: bool | None = None

    def blocks(self, train: bool) -> bool:
        """Whether rows of a mode show no numbers. A backend that refuses gradients may still run forward."""
        return self.status != OK and (self.status != REFUSED or self.gradients is train)


@dataclass(frozen=True)
class Shootout:
    """All results of one run.

    Attributes:
        plan: the fields of :class:`~attnzoo.benchmarks.runner.ShootoutPlan`.
        versions: versions and hardware.
        end_to_end: one verdict per family and backend; two for a backend that refuses gradients only.
        rows: one per case and contender, refused and skipped ones included.
        created: time of the start, ISO 8601, UTC.
        seconds: total duration.
    """

    plan: dict[str, Any]
    versions: dict[str, str]
    end_to_end: tuple[EndToEnd, ...]
    rows: tuple[Row, ...]
    created: str
    seconds: float
    schema: int = field(default=SCHEMA)

    @property
    def ok(self) -> bool:
        """Whether no row is red or failed; peers do not count."""
        return not any(row.status in (RED, FAILED) for row in self.rows if not row.peer)

    def write(self, path: Path) -> None:
        """Write a JSON file; create its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Shootout:
        """Read a file of :meth:`write`. Fields that are younger than the file get their defaults."""
        data = json.loads(path.read_text())
        data["rows"] = tuple(Row(**{**row, "runs": tuple(row["runs"])}) for row in data["rows"])
        data["end_to_end"] = tuple(EndToEnd(**verdict) for verdict in data["end_to_end"])
        return cls(**data)
