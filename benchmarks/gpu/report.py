"""The report of a session as Markdown: red lines first, then the original beside the best of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from attnzoo.benchmarks.cases import AUTO
from attnzoo.benchmarks.gpu.results import OVERRAN, Call, Results, Verdict
from attnzoo.benchmarks.rows import FAILED, OK, ORIGINAL, RED, Row
from attnzoo.benchmarks.tables import duration, ratio
from attnzoo.layout import group_by
from attnzoo.reporting.matrix_text import markdown_row

# ``auto`` may take this many times the original's time. Two runs of the same code differ by up to 3 %.
NOISE = 1.03
_COUNTING = "counting"


class CaseKey(NamedTuple):
    """What the rows of a case have in common."""

    scope: str
    family: str
    mode: str
    seq_len: int

    def __str__(self) -> str:
        return f"{self.family}, {self.scope}, {self.mode}, S = {self.seq_len}"


@dataclass(frozen=True)
class CaseRows:
    """The rows of a case that are compared: the original, the fastest backend, ``auto`` and the fastest peer.

    ``auto`` does not count as a backend, because it may run the model's own code.
    """

    key: CaseKey
    original: Row | None
    best: Row | None
    auto: Row | None
    peer: Row | None


def key_of(row: Row) -> CaseKey:
    """Return the case of a row."""
    return CaseKey(row.scope, row.family, row.mode, row.seq_len)


def all_rows(results: Results) -> list[Row]:
    """Return the rows of all shootouts."""
    return [row for shootout in results.shootouts for row in shootout.rows]


def compare(rows: Iterable[Row]) -> list[CaseRows]:
    """Return the rows to compare for each case. Only rows with a time are compared."""
    cases = []
    for same in group_by(rows, key_of):
        timed = [row for row in same if row.status == OK and row.seconds is not None]
        ours = [row for row in timed if not row.peer and row.backend not in (ORIGINAL, _COUNTING, AUTO)]
        original = next((row for row in timed if row.is_original), None)
        auto = next((row for row in timed if row.backend == AUTO), None)
        peers = [row for row in timed if row.peer]
        cases.append(CaseRows(key_of(same[0]), original, _fastest(ours), auto, _fastest(peers)))
    return cases


def _fastest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: row.seconds or 0.0, default=None)


def red_lines(index: Mapping[str, Any], results: Results) -> list[str]:
    """Return a line for everything that must be mended.

    These are wrong numbers, exceptions, items that failed or overran their limit, and cases in which ``auto`` is slower
    than the original. In a tiny run, times mean nothing.
    """
    lines = [f"item {item['name']}: {item['reason']}" for item in index["items"] if item["status"] in (FAILED, OVERRAN)]
    lines += [_verdict(verdict) for verdict in results.verdicts if verdict.status in (RED, FAILED)]
    rows = all_rows(results)
    for same in group_by(rows, key_of):
        original_ran = any(row.is_original and row.status == OK for row in same)
        wrong = [row for row in same if row.status in (RED, FAILED) and not (row.peer or row.is_original)]
        # A case that is too large for the device in the original is no fault of ours.
        wrong = [row for row in wrong if original_ran or "OutOfMemoryError" not in row.reason]
        lines += [f"{key_of(row)}: {row.label}: {row.status}: {row.reason.splitlines()[0]}" for row in wrong]
    for case in compare(rows):
        if is_slower(case) and not index["tiny"]:
            assert case.auto and case.original
            lines.append(
                f"{case.key}: auto ({case.auto.kernel_label}) takes {duration(case.auto.seconds)}, "
                f"the original {duration(case.original.seconds)}"
            )
    return lines


def is_slower(case: CaseRows) -> bool:
    """Whether ``auto`` is slower than the original by more than the noise."""
    original, auto = (None if row is None else row.seconds for row in (case.original, case.auto))
    return original is not None and auto is not None and auto > NOISE * original


def _verdict(verdict: Verdict) -> str:
    return ": ".join((verdict.what, verdict.status, *verdict.detail.splitlines()[:1]))


def report(index: Mapping[str, Any], results: Results) -> str:
    """Return the report of a session as Markdown. ``index`` is the content of ``index.json``."""
    return "\n".join(_lines(index, results)) + "\n"


def _lines(index: Mapping[str, Any], results: Results) -> Iterator[str]:
    machine = index["machine"]
    yield f"# {machine.get('gpu', machine['cpu'])}"
    yield from ("", ", ".join(f"{name} {value}" for name, value in machine.items()))
    if index["tiny"]:
        yield from ("", "Tiny models: this run tests the benchmark, and its times mean nothing.")
    lines = red_lines(index, results)
    yield from ("", f"## Red lines: {len(lines)}", "", *(f"- **RED** {line}" for line in lines))
    for cases in group_by(compare(all_rows(results)), lambda case: (case.key.scope, case.key.mode)):
        yield from ("", f"## {cases[0].key.scope}, {cases[0].key.mode}", "", *_table(cases))
    if results.calls:
        yield from ("", "## One call of a module", "", *_calls(results.calls))
    green = [verdict for verdict in results.verdicts if verdict.status not in (RED, FAILED)]
    yield from ("", "## Numbers", "", *(f"- {_verdict(verdict)}" for verdict in green)) if green else ()
    yield from ("", "## Items", "")
    yield markdown_row(("item", "status", "seconds", "estimate", "reason"))
    yield markdown_row(("---", "---", "--:", "--:", "---"))
    for item in index["items"]:
        numbers = f"{item['seconds']:.0f}", f"{item['estimate']:.0f}"
        yield markdown_row((item["name"], item["status"], *numbers, item["reason"]))


def _table(cases: Iterable[CaseRows]) -> Iterator[str]:
    columns = ("family", "S", "original", "best of ours", "backend", "speed", "memory", "auto", "speed", "best peer")
    yield markdown_row(columns)
    yield markdown_row("---" if column in ("family", "backend", "best peer") else "--:" for column in columns)
    for case in cases:
        best, auto, peer = case.best, case.auto, case.peer
        yield markdown_row(
            (
                case.key.family,
                str(case.key.seq_len),
                *_cells(case.original, "seconds"),
                *_cells(best, "seconds"),
                best.backend if best else "-",
                *_cells(best, "speedup", "peak_ratio"),
                *_cells(auto, "seconds", "speedup"),
                f"{duration(peer.seconds)} {peer.backend}" if peer else "-",
            )
        )


def _cells(row: Row | None, *names: str) -> list[str]:
    if row is None:
        return ["-"] * len(names)
    return [duration(row.seconds) if name == "seconds" else ratio(row, getattr(row, name)) for name in names]


def _calls(calls: Iterable[Call]) -> Iterator[str]:
    columns = ("family", "mode", "S", "backend", "launches", "synchronisations", "device time", "host time")
    yield markdown_row(columns)
    yield markdown_row("---" if column in ("family", "mode", "backend") else "--:" for column in columns)
    for call in calls:
        launches = "-" if call.launches is None else str(call.launches)
        times = duration(call.device_seconds), duration(call.host_seconds)
        cells = call.family, call.mode, str(call.seq_len), call.backend, launches, str(call.synchronisations), *times
        yield markdown_row(cells)
