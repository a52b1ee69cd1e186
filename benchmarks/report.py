"""The page about a shootout, for ``attnzoo report``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attnzoo.benchmarks.counting import Counting
from attnzoo.benchmarks.rows import FAILED, OK, ORIGINAL, RED, REFUSED, SKIPPED, EndToEnd, Row, Shootout
from attnzoo.benchmarks.summary import command
from attnzoo.benchmarks.tables import OVERHEAD, RECALL, SCOPE_TITLES, duration, notes, overhead, ratio, size
from attnzoo.layout import group_by
from attnzoo.reporting.html import charts
from attnzoo.reporting.html.content import Cell, Chart, Page, Section, Table, facts_of

_STATUS = {OK: "ok", RED: "wrong", FAILED: "failed", REFUSED: "refused", SKIPPED: "skipped"}
_SCOPES = {
    "model": "whole model",
    "module": "attention module",
    "attention": "attention alone",
    "overhead": "host time of a call",
    "decode": "decoding",
}
_COLUMNS = (
    "contender", "tokens", "kernel", "time", "range", "speed", "peak", "memory", "error", "of budget", "verdict",
)  # fmt: skip
_TEXT_COLUMNS = ("contender", "kernel", "verdict")
_LEGEND = (
    "speed: the original's median time divided by the median time of the row. Above 1x is faster than the original.",
    "peak: memory that a run needs in addition to weights and inputs. memory: this peak divided by the original's. "
    "Below 1x is less than the original.",
    "error: the largest difference from the oracle in float64, in the worst comparison. of budget: this error divided "
    "by the largest error that passes, which is a small multiple of the error of plain operations in the same dtype.",
    "verdict: ok means that every comparison is within its budget. A result that is wrong or failed has no speed. The "
    "original is the reference of the ratios. The attention of other libraries is unchecked.",
)
_TOOLTIP = ("series", "kernel", "tokens", "time", "range", "speed", "peak", "memory", "of budget")


def page_of(shootout: Shootout) -> Page:
    """Return the page: a section for each family, scope and mode, and one for the checks of whole models."""
    groups = group_by(shootout.rows, lambda row: (row.family, row.scope, row.mode))
    names = dict.fromkeys(row.checkpoint for row in shootout.rows)
    wrong = [row for row in shootout.rows if row.status in (RED, FAILED) and not row.peer]
    verdict = "Every measured result is within the error rule"
    if wrong:
        verdict = f"NOT within the error rule, or failed: {len(wrong)} of {len(shootout.rows)} results"
    first = shootout.rows[0]
    setting = f"{first.dtype}, batch {first.batch}, {first.hardware}"
    labels = dict.fromkeys(row.label for row in sorted(shootout.rows, key=lambda row: not row.is_original))
    sections = [_section(rows) for rows in groups]
    if shootout.end_to_end:
        sections.append(_end_to_end(shootout.end_to_end))
    sections.append(Section("How to read the tables", notes=tuple(_legend(shootout.rows))))
    return Page(
        f"{', '.join(names)}: {_SCOPES[first.scope]}",
        f"attnzoo bench: {SCOPE_TITLES[first.scope]}; {setting}",
        shootout.ok,
        verdict,
        tuple(_highlights(shootout.rows)),
        facts_of(shootout.versions, shootout.created, ("duration", f"{shootout.seconds:.0f} s"), ("setting", setting)),
        (command(shootout),),
        tuple(labels),
        tuple(sections),
    )


def _legend(rows: Sequence[Row]) -> Iterator[str]:
    yield from _LEGEND
    if any(row.overhead is not None for row in rows):
        yield OVERHEAD
    if any(row.recall is not None for row in rows):
        yield RECALL


def _highlights(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield the best speed and memory at the longest input of each mode, and the largest error of a backend."""
    others = (ORIGINAL, Counting.name)
    ours = [row for row in rows if row.status == OK and row.backend not in others and not row.peer]
    for of_mode in group_by(ours, lambda row: (row.family, row.mode)):
        longest = max(row.seq_len for row in of_mode)
        at_end = [row for row in of_mode if row.seq_len == longest]
        where = f"{at_end[0].family}, {at_end[0].mode} at {longest} tokens"
        timed = [row for row in at_end if row.speedup is not None]
        if timed:
            best = max(timed, key=lambda row: row.speedup or 0.0)
            yield f"{best.speedup:.2f}x", f"speed: {best.label}, {where}"
        sized = [row for row in at_end if row.peak_ratio is not None]
        if sized:
            least = min(sized, key=lambda row: row.peak_ratio or 0.0)
            yield f"{least.peak_ratio:.2f}x", f"extra memory: {least.label}, {where}"
    shares = [share for row in ours if (share := _share(row)) is not None]
    if shares:
        yield f"{max(shares):.2f}", "largest error of a backend, of its budget"


def _share(row: Row) -> float | None:
    return None if row.error is None or not row.budget else row.error / row.budget


def _section(rows: Sequence[Row]) -> Section:
    first = rows[0]
    shown = [row for row in rows if row.status not in (REFUSED, SKIPPED)]
    columns = [*_COLUMNS]
    if any(row.overhead is not None for row in rows):
        columns.insert(columns.index("peak"), "overhead")
    if any(row.recall is not None for row in rows):
        columns.insert(columns.index("verdict"), "recall")
    table = Table(
        tuple(columns),
        tuple((row.label, tuple(_cells(row)[name] for name in columns)) for row in shown),
        tuple(name for name in columns if name not in _TEXT_COLUMNS),
    )
    return Section(
        f"{first.family}: {first.mode}",
        tuple(_charts([row for row in shown if row.status == OK])),
        (table,) if shown else (),
        (*_reasons(rows), *notes(list(rows))),
    )


def _charts(rows: Sequence[Row]) -> Iterator[Chart]:
    records = [_record(row) for row in rows]
    timed = [record for record in records if record["seconds"] is not None]
    if timed:
        spec = charts.over_length(timed, "seconds", charts.SECONDS, _TOOLTIP)
        yield Chart("Time", "Median of the timed runs, with their range. Lower is better.", spec)
    sized = [record for record in records if record["bytes"]]
    if sized:
        without_range = [{k: v for k, v in record.items() if k not in ("fastest", "slowest")} for record in sized]
        spec = charts.over_length(without_range, "bytes", charts.BYTES, _TOOLTIP)
        yield Chart("Peak memory", "In addition to weights and inputs. Lower is better.", spec)
    compared = [record for record in records if record["speedup"] is not None and record["share"] is not None]
    if compared:
        explanation = "Right of 1x is faster than the original. Below the horizontal line passes the error rule."
        yield Chart("Error beside speed", explanation, charts.error_beside_speed(compared, _TOOLTIP))


def _record(row: Row) -> dict[str, Any]:
    texts = {name: cell.text for name, cell in _cells(row).items() if name in _TOOLTIP and name != "tokens"}
    numbers = dict(seconds=row.seconds, fastest=row.fastest, slowest=row.slowest, bytes=row.peak_bytes)
    ratios = dict(speedup=row.speedup, share=_share(row))
    return {**texts, **numbers, **ratios, "series": row.label, "tokens": row.seq_len}


def _cells(row: Row) -> dict[str, Cell]:
    share = _share(row)
    times = "-" if row.fastest is None else f"{duration(row.fastest)} to {duration(row.slowest)}"
    verdict = "unchecked" if row.peer and row.status == OK else _STATUS[row.status]
    if row.is_original and row.status == OK:
        verdict = "reference"
    mark = "bad" if row.status in (RED, FAILED) else "good" if share is not None and row.status == OK else ""
    return {
        "contender": Cell(row.label, row.label),
        "tokens": Cell(str(row.seq_len), row.seq_len),
        "kernel": Cell(row.kernel_label, row.kernel_label),
        "time": Cell(duration(row.seconds), row.seconds),
        "range": Cell(times, row.fastest),
        "speed": Cell(ratio(row, row.speedup), row.speedup),
        "overhead": Cell(overhead(row), row.overhead),
        "peak": Cell(size(row.peak_bytes), row.peak_bytes),
        "memory": Cell(ratio(row, row.peak_ratio), row.peak_ratio),
        "error": Cell("-" if row.error is None else f"{row.error:.1e}", row.error),
        "of budget": Cell("-" if share is None else f"{share:.2f}", share, bar=share),
        "recall": Cell("-" if row.recall is None else f"{row.recall:.3f}", row.recall),
        "verdict": Cell(verdict, verdict, mark),
    }


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one line for each reason why contenders have no numbers."""
    silent = [row for row in rows if row.status != OK]
    for same in group_by(silent, lambda row: (row.status, row.reason)):
        names = ", ".join(dict.fromkeys(row.label for row in same))
        lengths = ", ".join(str(length) for length in sorted({row.seq_len for row in same}))
        yield f"{names} at {lengths} tokens: {_STATUS[same[0].status]}: {' '.join(same[0].reason.split())}"


def _end_to_end(verdicts: Sequence[EndToEnd]) -> Section:
    details = []
    for verdict in verdicts:
        mode = "forward+backward" if verdict.gradients else "forward"
        head = f"{verdict.family}, {verdict.backend}, {mode} at {verdict.seq_len} tokens: {_STATUS[verdict.status]}"
        details.append((head, verdict.report or "no report"))
    note = "Before the timed runs, a model with one layer was compared with the oracle in float64, end to end."
    return Section("Whole models against the oracle", notes=(note,), details=tuple(details))
