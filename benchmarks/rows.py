"""The results of a shootout: rows and end-to-end verdicts, and the JSON file that stores these results."""

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
    """Exception for a row that cannot be measured. ``status`` is REFUSED, SKIPPED, RED or FAILED."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Row:
    """The result of one contender in one case. Only a row with status ``"ok"`` has times.

    Attributes:
        family, scope, seq_len, batch, dtype, device, threads, mode: as in :class:`~attnzoo.benchmarks.cases.Case`.
        checkpoint: name of the checkpoint that has the configuration of the family.
        backend: the requested backend with options. ``"native"`` is the original.
        kernel: names of the kernels that ran. None if no kernel ran.
        versions: versions of the software and names of the hardware.
        status: ``"ok"``, ``"refused"`` (the backend does not support the case), ``"skipped"`` (left out), ``"red"``
            (wrong numbers, or another kernel than requested) or ``"failed"`` (an exception).
        reason: the reason for a status other than ``"ok"``.
        seconds: median seconds of the timed runs. In the scopes ``overhead`` and ``decode``, median CPU seconds of one
            call or token.
        fastest, slowest: seconds of the fastest and of the slowest timed run.
        runs: seconds of every timed run, in order.
        sites: number of attention modules that a timed step ran. None unless the scope measures the host time.
        overhead: CPU seconds over the original's for each of these modules: the median of the differences between timed
            runs of the same round. None if ``sites`` is None.
        speedup: median seconds of the original divided by ``seconds``. A value above 1 means faster than the original.
        peak_bytes: bytes that the first run in a fresh process needs in addition to weights and inputs.
        peak_ratio: ``peak_bytes`` divided by the original's ``peak_bytes``. A value below 1 means less memory.
        before_bytes: bytes in use before the first run.
        memory_method: name of the method that measured the peak.
        worst: what the worst check compared. The worst check has the largest error as a fraction of the error budget.
        error: largest absolute difference from the float64 oracle in the worst check.
        budget: error budget of the worst check.
        checks: number of comparisons with the float64 oracle.
        recall: share of full attention's weight on the keys that queries still see with the backend: the mean over
            heads and checked queries. None if the backend does not change the pattern.
        peer: whether the contender is a peer. Peers are not checked, and never make the shootout fail.
        note: how the case differs from the published configuration, and whether the times are CPU time. Empty if there
            is no difference, and the times are wall-clock time.
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
    sites: int | None = None
    overhead: float | None = None
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
        """The name of the backend in tables and plots."""
        return "original" if self.is_original else self.backend

    @property
    def kernel_label(self) -> str:
        """The name of the kernel in tables, or ``"-"`` if no kernel ran."""
        return (self.kernel or "-").removeprefix("original ")

    @property
    def hardware(self) -> str:
        """The name of the device that computed the row."""
        return self.versions["gpu"] if self.device == "cuda" else f"{self.versions['cpu']}, {self.threads} thread(s)"

    def with_times(self, runs: tuple[float, ...]) -> Row:
        """Return the row with ``runs`` (the seconds of each timed run), and with the median, minimum and maximum."""
        return replace(self, runs=runs, seconds=statistics.median(runs), fastest=min(runs), slowest=max(runs))

    def without_measurements(self, status: str, reason: str) -> Row:
        """Return the row with a new status and without times and memory, because another backend may have run."""
        return replace(
            self, status=status, reason=reason, runs=(), seconds=None, fastest=None, slowest=None, speedup=None,
            sites=None, overhead=None,
            peak_bytes=None, peak_ratio=None, before_bytes=None, memory_method=None,
        )  # fmt: skip

    def compared_with(self, original: Row | None) -> Row:
        """Return the row with the ratios to ``original``, the row of the original model in the same case."""
        if original is None or original.status != OK or self.status != OK:
            return self
        speedup = original.seconds / self.seconds if original.seconds and self.seconds else None
        ratio = self.peak_bytes / original.peak_bytes if original.peak_bytes and self.peak_bytes is not None else None
        overhead = None
        if self.sites and not self.is_original:
            differences = [ours - theirs for ours, theirs in zip(self.runs, original.runs, strict=False)]
            overhead = statistics.median(differences) / self.sites
        return replace(self, speedup=speedup, peak_ratio=ratio, overhead=overhead)


@dataclass(frozen=True)
class EndToEnd:
    """The verdict of :func:`attnzoo.verify` on a backend in a whole one-layer model of the family.

    Attributes:
        status: a status as in :class:`Row`.
        report: text of the report, or the reason why there is no report.
        gradients: whether gradients were compared, too. None in old result files without this field.
    """

    family: str
    backend: str
    seq_len: int
    status: str
    report: str
    gradients: bool | None = None

    def blocks(self, train: bool) -> bool:
        """Whether this verdict excludes the rows of a mode.

        A refusal excludes only the mode that was verified. Wrong numbers and exceptions exclude both modes.
        """
        return self.status != OK and (self.status != REFUSED or self.gradients is train)


@dataclass(frozen=True)
class Shootout:
    """All results of one run.

    Attributes:
        plan: values of the fields of the :class:`~attnzoo.benchmarks.runner.ShootoutPlan`.
        versions: versions of the software and names of the hardware.
        end_to_end: one verdict per family and backend, and a second verdict without gradients if gradients are refused.
        rows: one row per case and contender, including refused and skipped rows.
        created: start time in UTC, in the format ISO 8601.
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
        """Whether no row is red or failed. Rows of peers are ignored."""
        return not any(row.status in (RED, FAILED) for row in self.rows if not row.peer)

    def write(self, path: Path) -> None:
        """Write the results to a JSON file, and create the folder of the file if it is missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Shootout:
        """Return the results from a file that :meth:`write` wrote. Fields that an old file lacks get default values."""
        return cls.from_json(json.loads(path.read_text()))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Shootout:
        """Return the results from the content of such a file. ``data`` is changed."""
        data["rows"] = tuple(Row(**{**row, "runs": tuple(row["runs"])}) for row in data["rows"])
        data["end_to_end"] = tuple(EndToEnd(**verdict) for verdict in data["end_to_end"])
        return cls(**data)
