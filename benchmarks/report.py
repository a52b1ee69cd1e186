"""The tables at the end, one per family, scope and mode: they fit 80 columns, and 60 without the spread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnzoo.benchmarks import rows as status
from attnzoo.benchmarks.contenders import ORIGINAL
from attnzoo.benchmarks.rows import EndToEnd, Row, Shootout
from attnzoo.layout import fit, group_by

_STYLES = {status.RED: "bold red", status.FAILED: "red"}
_VERDICTS = {status.RED: "RED", status.FAILED: "failed", status.REFUSED: "refused", status.SKIPPED: "left out"}
_SCOPES = {
    "model": "whole model",
    "module": "one self-attention module, projections included",
    "attention": "attention alone: one module, measured time of its projections taken off",
}
_WRAPS = ("backend", "kernel")
_LEFT = (*_WRAPS, "gate")
# What a narrow terminal has no room for goes first: columns to leave out, and blanks between the others.
_LAYOUTS: tuple[tuple[set[str], int], ...] = ((set(), 2), (set(), 1), ({"min - max"}, 1), ({"min - max", "peak"}, 1))
_LEGEND = (
    "speed: the original's median over the row's, above 1 is faster. peak: memory on top of weights and inputs; "
    "memory: over the original's, below 1 is less. gate: of the check closest to its budget, the error against the "
    "float64 oracle, over that budget."
)
_RECALL = (
    "recall: the backend changes the pattern, and is judged with that change; the keys still seen hold this share of "
    "full attention's weight."
)
_PEER = (
    "peer: another library's attention on random tensors of the same sizes; it computes something slightly different, "
    "so its numbers are not judged."
)


def show(shootout: Shootout, console: Console) -> None:
    """Print the tables, what was not run and why, and the legend."""
    for part in _parts(shootout, console.width):
        if isinstance(part, Text):
            part = Text(fit(part.plain, console.width), style=part.style)
        console.print(part, soft_wrap=isinstance(part, Text))


def _parts(shootout: Shootout, width: int) -> Iterator[Table | Text]:
    for rows in group_by(shootout.rows, lambda row: (row.family, row.scope)):
        yield from _headline(rows[0], shootout)
        for shown in group_by(_shown(rows), lambda row: row.mode):
            yield Text(f"\n{shown[0].mode}", style="italic")
            yield _table(shown, width)
        yield Text()
        yield from _not_run(rows)
        yield from _complaints(rows)
        yield from (
            Text(note, style="dim")
            for note in dict.fromkeys(f"S={row.seq_len}: {row.note}" for row in rows if row.note)
        )
    yield Text(_LEGEND, style="dim")
    if any(row.recall is not None for row in shootout.rows):
        yield Text(_RECALL, style="dim")
    if any(row.peer for row in shootout.rows):
        yield Text(_PEER, style="dim")
    yield from _gates(shootout.end_to_end)


def _headline(row: Row, shootout: Shootout) -> Iterator[Text]:
    versions = shootout.versions
    where = versions.get("gpu") if row.device == "cuda" else f"{versions['cpu']}, {row.threads} thread(s)"
    yield Text(f"\n{row.checkpoint}: {_SCOPES[row.scope]}", style="bold")
    yield Text(
        f"{row.dtype}, batch {row.batch}, {where}; torch {versions['torch']}, transformers {versions['transformers']}, "
        f"attnzoo {versions['attnzoo']}, Python {versions['python']}",
        style="dim",
    )


def _shown(rows: Iterable[Row]) -> list[Row]:
    """Rows with something to see: numbers, or what is wrong."""
    return [row for row in rows if row.status not in (status.REFUSED, status.SKIPPED)]


def _table(rows: list[Row], width: int) -> Table:
    """A table whose columns are as wide as their longest word, at least."""
    cells = {id(row): _cells(row) for row in rows}
    names = [name for name in cells[id(rows[0])] if name != "recall" or any(row.recall is not None for row in rows)]
    texts = {name: [name, *(cells[id(row)][name] for row in rows)] for name in names}
    needed = {name: max(len(word) for text in texts[name] for word in _words(name, text)) for name in names}
    for without, gap in _LAYOUTS:
        kept = [name for name in names if name not in without]
        spare = width - sum(needed[name] for name in kept) - gap * (len(kept) - 1)
        if spare >= 0:
            break
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for name in kept:
        more = max(0, min(spare, max(map(len, texts[name])) - needed[name]))
        spare -= more
        table.add_column(name, width=needed[name] + more, justify="left" if name in _LEFT else "right")
    for same in group_by(rows, lambda row: row.seq_len):
        table.add_row(f"S = {same[0].seq_len}", style="italic")
        for row in same:
            table.add_row(*(cells[id(row)][name] for name in kept), style=_STYLES.get(row.status, ""))
    return table


def _words(column: str, text: str) -> list[str]:
    """What must stay on one line."""
    return text.split() if column in _WRAPS else [text]


def _cells(row: Row) -> dict[str, str]:
    original, ran = row.backend == ORIGINAL, row.status == status.OK
    return {
        "backend": "original" if original else row.backend.replace(":", ": ").replace(",", ", "),
        "kernel": (row.kernel or "-").removeprefix("original ").replace("+", " + "),
        "median": duration(row.seconds),
        "min - max": _spread(row),
        "speed": "1" if original and ran else _ratio(row.speedup),
        "peak": size(row.peak_bytes),
        "memory": "1" if original and ran else _ratio(row.peak_ratio),
        "gate": _gate(row),
        "recall": "-" if row.recall is None else f"{row.recall:.3f}",
    }


def _gate(row: Row) -> str:
    if row.status != status.OK:
        return _VERDICTS[row.status]
    if row.peer:
        return "peer"
    return "-" if row.error is None or not row.budget else f"ok {row.error / row.budget:.2f}"


def _spread(row: Row) -> str:
    """Fastest and slowest run, in the unit of the median."""
    if row.seconds is None or row.fastest is None or row.slowest is None:
        return "-"
    if row.seconds >= 1:
        digits = 2 if row.slowest < 10 else 1
        return f"{row.fastest:.{digits}f}-{row.slowest:.{digits}f}"
    return f"{row.fastest * 1e3:.0f}-{row.slowest * 1e3:.0f}"


def duration(value: float | None) -> str:
    """Seconds with a fitting unit."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def size(value: float | None) -> str:
    """Bytes in MiB or GiB."""
    if value is None:
        return "-"
    return f"{value / 2**20:.0f} MiB" if value < 10 * 2**30 else f"{value / 2**30:.1f} GiB"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _not_run(rows: list[Row]) -> Iterator[Text]:
    """Contenders that were refused or left out, in one paragraph: equal reasons together."""
    silent = [row for row in rows if row.status in (status.REFUSED, status.SKIPPED)]
    told: dict[str, list[str]] = {}
    for same in group_by(silent, lambda row: (row.backend, row.reason)):
        told.setdefault(f"{_where(same, rows)} ({' '.join(same[0].reason.split())})", []).append(_name(same[0]))
    if told:
        yield Text(f"not run: {'; '.join(', '.join(names) + where for where, names in told.items())}", style="yellow")


def _where(silent: list[Row], rows: list[Row]) -> str:
    """At which of a contender's lengths and modes; empty where at all."""
    everywhere = [row for row in rows if row.backend == silent[0].backend]
    lengths, modes = sorted({row.seq_len for row in silent}), {row.mode for row in silent}
    at = f" at S={', '.join(map(str, lengths))}" if len(lengths) < len({row.seq_len for row in everywhere}) else ""
    return at + (f", {silent[0].mode}" if len(modes) < len({row.mode for row in everywhere}) else "")


def _name(row: Row) -> str:
    return "original" if row.backend == ORIGINAL else row.backend


def _complaints(rows: Iterable[Row]) -> Iterator[Text]:
    """Why rows are red or failed, equal reasons together."""
    wrong = [row for row in rows if row.status in (status.RED, status.FAILED)]
    for same in group_by(wrong, lambda row: (row.status, row.reason)):
        where = ", ".join(f"{row.backend} S={row.seq_len} {row.mode}" for row in same)
        reason = same[0].reason.replace("\n", "\n    ")
        yield Text(f"{_VERDICTS[same[0].status]}: {where}\n    {reason}", style=_STYLES[same[0].status])


def _gates(verdicts: Iterable[EndToEnd]) -> Iterator[Text]:
    """The verdicts on whole small models, equal ones together."""
    for same in group_by(
        verdicts, lambda verdict: (verdict.family, verdict.seq_len, verdict.gradients, verdict.status)
    ):
        first = same[0]
        word = "within the error rule" if first.status == status.OK else _VERDICTS[first.status]
        what = "forward+backward" if first.gradients else "forward"
        names = ", ".join(verdict.backend for verdict in same)
        where = f"end to end, {first.family} at S={first.seq_len}, {what}"
        yield Text(f"{where}: {names}: {word}", style=_STYLES.get(first.status, "dim"))
