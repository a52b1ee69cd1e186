"""What a shootout finds: rows, and the JSON they are kept in."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SCHEMA = 1
OK, REFUSED, SKIPPED, RED, FAILED = "ok", "refused", "skipped", "red", "failed"


@dataclass(frozen=True)
class Row:
    """One contender in one case. A speed is there only if ``status`` is ``"ok"``.

    Attributes:
        family: the model family; ``checkpoint`` whose configuration.
        scope: ``"model"``, ``"module"`` or ``"attention"``.
        backend: what was asked for; ``"native"`` is the original.
        kernel: what really ran; None if nothing did.
        seq_len: tokens.
        batch: passages.
        dtype: e.g. ``"float32"``.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads.
        mode: ``"forward"`` or ``"forward+backward"``.
        status: ``"ok"``, ``"refused"`` (the backend cannot), ``"skipped"`` (left out, see reason), ``"red"`` (wrong
            numbers, or not what was asked for) or ``"failed"``.
        reason: in words, for all but ``"ok"``.
        seconds: median of the runs.
        fastest, slowest: the spread.
        runs: every timed run, in order.
        speedup: the original's median over this one's; above 1 is faster.
        peak_bytes: memory a first run in a fresh process needs on top of weights and inputs.
        peak_ratio: the same over the original's; below 1 is less.
        before_bytes: in use before that run.
        memory_method: how that was measured.
        error: error of the check closest to its budget (largest absolute difference from the float64 oracle).
        budget: that check's budget.
        worst: what that check compared.
        checks: number of comparisons made.
        recall: of a backend that changes the pattern: the share of full attention's weight on the keys it sees, mean
            over heads and judged rows.
        peer: another library's attention: its numbers are not judged, and it never counts as ours.
        note: what differs from the published configuration, in words; empty: nothing.
        versions: versions and hardware.
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

    def timed(self, runs: tuple[float, ...]) -> Row:
        """The row with its times."""
        return replace(self, runs=runs, seconds=statistics.median(runs), fastest=min(runs), slowest=max(runs))

    def silenced(self, status: str, reason: str) -> Row:
        """The row with neither speed nor memory: what it measured is not the thing asked for."""
        return replace(
            self, status=status, reason=reason, runs=(), seconds=None, fastest=None, slowest=None, speedup=None,
            peak_bytes=None, peak_ratio=None, before_bytes=None, memory_method=None,
        )  # fmt: skip

    def compared(self, original: Row | None) -> Row:
        """The row with its ratios to the original of the same case."""
        if original is None or original.status != OK or self.status != OK:
            return self
        speedup = original.seconds / self.seconds if original.seconds and self.seconds else None
        ratio = self.peak_bytes / original.peak_bytes if original.peak_bytes and self.peak_bytes is not None else None
        return replace(self, speedup=speedup, peak_ratio=ratio)


@dataclass(frozen=True)
class EndToEnd:
    """:func:`attnzoo.verify`'s verdict on a backend for a whole small model of the family.

    Attributes:
        gradients: whether they were compared too; None in results from before this was told.
    """

    family: str
    backend: str
    seq_len: int
    status: str
    report: str
    gradients: bool | None = None

    def bars(self, train: bool) -> bool:
        """Whether rows of a mode show no numbers for it: who refuses gradients may well run without."""
        return self.status != OK and (self.status != REFUSED or self.gradients is train)


@dataclass(frozen=True)
class Shootout:
    """Everything a run found.

    Attributes:
        plan: what was asked for.
        versions: versions and hardware.
        end_to_end: a verdict per family and backend; two for a backend that refuses gradients and not the rest.
        rows: one per case and contender, refused and skipped ones included.
        created: when, ISO 8601, UTC.
        seconds: how long it took in all.
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
        """Whether no row is red or failed; what becomes of a peer is not our verdict."""
        return not any(row.status in (RED, FAILED) for row in self.rows if not row.peer)

    def write(self, path: Path) -> None:
        """Write JSON, folders included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Shootout:
        """Read what :meth:`write` wrote."""
        data = json.loads(path.read_text())
        data["rows"] = tuple(Row(**{**row, "runs": tuple(row["runs"])}) for row in data["rows"])
        data["end_to_end"] = tuple(EndToEnd(**verdict) for verdict in data["end_to_end"])
        return cls(**data)
