"""Rows, results and an index of a session on a GPU that does not exist."""

from __future__ import annotations

from attnzoo.benchmarks.gpu.results import Results
from attnzoo.benchmarks.rows import FAILED, OK, RED, Row, Shootout

MACHINE = {"gpu": "Imaginary 9000", "cpu": "a CPU", "torch": "9.9"}


def row(backend: str, seconds: float | None = 1.0, **changes) -> Row:
    """A timed row of LED's module. Without seconds, the row failed."""
    fields = dict(
        family="led", checkpoint="led-base", scope="module", seq_len=16384, batch=1, dtype="bfloat16", device="cuda",
        threads=1, mode="forward", versions=MACHINE, status=OK if seconds is not None else FAILED, kernel="kernel",
        seconds=seconds, speedup=1 / seconds if seconds else None,
    )  # fmt: skip
    return Row(backend=backend, **{**fields, **changes})


def results(*rows: Row, verdicts=(), calls=()) -> Results:
    shootouts = (Shootout({}, MACHINE, (), rows, "2026-01-01", 1.0),) if rows else ()
    return Results(shootouts, tuple(verdicts), tuple(calls))


def red(backend: str, reason: str = "outside the error budget") -> Row:
    return row(backend, None, status=RED, reason=reason)


def index(*items, tiny=False):
    return dict(device="cuda", tiny=tiny, seconds=300.0, machine=MACHINE, items=list(items))


def ended(name, status="done", reason=""):
    return dict(name=name, status=status, seconds=1.0, estimate=2.0, limit=3.0, reason=reason)
