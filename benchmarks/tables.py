"""Print the results of a shootout: one table per family, scope and mode, the reasons for missing rows, and a legend.

A table is at most 80 characters wide. On a narrower terminal, the table leaves out the columns ``min - max`` and
``peak`` if necessary, and is at most 60 characters wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnzoo.benchmarks.rows import FAILED, OK, RED, REFUSED, SKIPPED, EndToEnd, Row, Shootout
from attnzoo.layout import fit, group_by

SCOPE_TITLES = {
    "model": "whole model",
    "module": "one self-attention module with its projections",
    "attention": "attention alone (one module, time of its projections subtracted)",
    "overhead": "CPU time of one call of a self-attention module",
    "decode": "CPU time per token of greedy decoding, after a prompt of S tokens",
}
_STYLES = {RED: "bold red", FAILED: "red"}
_STATUS_WORDS = {RED: "RED", FAILED: "failed", REFUSED: "refused", SKIPPED: "skipped"}
_WRAPPED_COLUMNS = ("backend", "kernel")
_LEFT_COLUMNS = (*_WRAPPED_COLUMNS, "gate")
# From wide to narrow terminals: the columns to leave out, and the number of spaces between the other columns.
_LAYOUTS: tuple[tuple[set[str], int], ...] = ((set(), 2), (set(), 1), ({"min - max"}, 1), ({"min - max", "peak"}, 1))
_LEGEND = (
    "speed: the original's median time divided by this row's median time; above 1x is faster than the original.",
    "peak: memory that a run needs in addition to weights and inputs. "
    "memory: this row's peak divided by the original's peak; below 1x is less than the original.",
    "gate: ok means that every comparison with the float64 oracle is within its error budget. "
    "The number is the largest error divided by the error budget; up to 1 passes.",
)
OVERHEAD = (
    "overhead: CPU time above the original's for each attention module and call or token (median of the differences "
    "between runs of the same round). counting is the original model with the patch native, which only counts calls."
)
RECALL = (
    "recall: this backend sees only a part of the keys. Recall is the share of full attention's weight that is on this "
    "part; 1 is all of it. The gate compares the backend with the oracle on the same part of the keys."
)
_PEER = (
    "peer: the attention of another library, on random tensors of the same sizes. It computes a slightly different "
    "function, so no gate checks its numbers."
)


def show(shootout: Shootout, console: Console) -> None:
    """Print the tables, the reasons why some rows did not run, and the legend."""
    for part in _parts(shootout, console.width):
        if isinstance(part, Text):
            part = Text(fit(part.plain, console.width), style=part.style)
        console.print(part, soft_wrap=isinstance(part, Text))


def _parts(shootout: Shootout, width: int) -> Iterator[Table | Text]:
    for rows in group_by(shootout.rows, lambda row: (row.family, row.scope)):
        first, versions = rows[0], shootout.versions
        yield Text(f"\n{first.checkpoint}: {SCOPE_TITLES[first.scope]}", style="bold")
        software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "attnzoo"))
        software += f", Python {versions['python']}"
        yield Text(f"{first.dtype}, batch {first.batch}, {first.hardware}; {software}", style="dim")
        in_table = [row for row in rows if row.status not in (REFUSED, SKIPPED)]
        for of_mode in group_by(in_table, lambda row: row.mode):
            yield Text(f"\n{of_mode[0].mode}", style="italic")
            yield _table(of_mode, width)
        yield Text()
        yield from _not_run(rows)
        yield from _complaints(rows)
        yield from (Text(note, style="dim") for note in notes(rows))
    legend = [*_LEGEND]
    legend += [OVERHEAD] * any(row.overhead is not None for row in shootout.rows)
    legend += [RECALL] * any(row.recall is not None for row in shootout.rows)
    legend += [_PEER] * any(row.peer for row in shootout.rows)
    yield from (Text(line, style="dim") for line in legend)
    yield from _end_to_end(shootout.end_to_end)


def _table(rows: list[Row], width: int) -> Table:
    """Return a table. Each column is at least as wide as the longest word in this column."""
    cells = [_cells(row) for row in rows]
    names = [name for name in cells[0] if any(getattr(row, name, "always") is not None for row in rows)]
    texts = {name: [name, *(row_cells[name] for row_cells in cells)] for name in names}
    needed = {
        name: max(len(word) for text in texts[name] for word in (text.split() if name in _WRAPPED_COLUMNS else [text]))
        for name in names
    }
    for without, gap in _LAYOUTS:
        kept = [name for name in names if name not in without]
        spare = width - sum(needed[name] for name in kept) - gap * (len(kept) - 1)
        if spare >= 0:
            break
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for name in kept:
        more = max(0, min(spare, max(map(len, texts[name])) - needed[name]))
        spare -= more
        justify = "left" if name in _LEFT_COLUMNS else "right"
        table.add_column(name, width=needed[name] + more, justify=justify)  # type: ignore[arg-type]
    for of_length in group_by(zip(rows, cells, strict=True), lambda pair: pair[0].seq_len):
        table.add_row(f"S = {of_length[0][0].seq_len}", style="italic")
        for row, row_cells in of_length:
            table.add_row(*(row_cells[name] for name in kept), style=_STYLES.get(row.status, ""))
    return table


def _cells(row: Row) -> dict[str, str]:
    return {
        "backend": row.label.replace(":", ": ").replace(",", ", "),
        "kernel": row.kernel_label.replace("+", " + "),
        "median": duration(row.seconds),
        "min - max": _range(row),
        "overhead": overhead(row),
        "speed": ratio(row, row.speedup),
        "peak": size(row.peak_bytes),
        "memory": ratio(row, row.peak_ratio),
        "gate": _gate(row),
        "recall": "-" if row.recall is None else f"{row.recall:.3f}",
    }


def _gate(row: Row) -> str:
    if row.status != OK:
        return _STATUS_WORDS[row.status]
    if row.peer:
        return "peer"
    return "-" if row.error is None or not row.budget else f"ok {row.error / row.budget:.2f}"


def _range(row: Row) -> str:
    """Return the fastest and the slowest time as text, in the unit of the median."""
    if row.seconds is None or row.fastest is None or row.slowest is None:
        return "-"
    if row.seconds >= 1:
        digits = 2 if row.slowest < 10 else 1
        return f"{row.fastest:.{digits}f}-{row.slowest:.{digits}f}"
    digits = _digits(row.seconds)
    return f"{row.fastest * 1e3:.{digits}f}-{row.slowest * 1e3:.{digits}f}"


def duration(value: float | None) -> str:
    """Return a number of seconds as text, in s or ms. The text for None is ``"-"``."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.{_digits(value)}f} ms"


def _digits(seconds: float) -> int:
    """Return the number of digits after the point for a time in milliseconds."""
    return 0 if seconds >= 0.01 else 2


def size(value: float | None) -> str:
    """Return a number of bytes as text, in MiB or GiB. The text for None is ``"-"``."""
    if value is None:
        return "-"
    return f"{value / 2**20:.0f} MiB" if value < 10 * 2**30 else f"{value / 2**30:.1f} GiB"


def ratio(row: Row, value: float | None) -> str:
    """Return the ratio of a row to the original as text. The text for the original itself is ``"1"``."""
    if row.is_original and row.status == OK:
        return "1"
    return "-" if value is None else f"{value:.2f}x"


def overhead(row: Row) -> str:
    """Return the CPU time above the original's per attention module as text, in microseconds."""
    return "-" if row.overhead is None else f"{row.overhead * 1e6:.0f} us"


def notes(rows: Iterable[Row]) -> list[str]:
    """Return how the case of each row differs from the published configuration, without duplicates."""
    return list(dict.fromkeys(f"S = {row.seq_len}: {row.note}." for row in rows if row.note))


def _not_run(rows: list[Row]) -> Iterator[Text]:
    """Yield one paragraph about refused and skipped rows. Contenders with the same reason are listed together."""
    silent = [row for row in rows if row.status in (REFUSED, SKIPPED)]
    names: dict[str, list[str]] = {}
    for same in group_by(silent, lambda row: (row.backend, row.reason)):
        reason = " ".join(same[0].reason.split())
        names.setdefault(f"{_places(same, rows)} ({reason})", []).append(same[0].label)
    if names:
        yield Text("not run: " + "; ".join(", ".join(some) + why for why, some in names.items()), style="yellow")


def _places(silent: list[Row], rows: list[Row]) -> str:
    """Return, as text, the lengths and the mode in which a contender did not run. "" means all lengths and modes."""
    all_rows = [row for row in rows if row.backend == silent[0].backend]
    lengths, modes = sorted({row.seq_len for row in silent}), {row.mode for row in silent}
    at = f" at S={', '.join(map(str, lengths))}" if len(lengths) < len({row.seq_len for row in all_rows}) else ""
    return at + (f", {silent[0].mode}" if len(modes) < len({row.mode for row in all_rows}) else "")


def _complaints(rows: Iterable[Row]) -> Iterator[Text]:
    """Yield the reasons for red and failed rows. Rows with the same reason share one paragraph."""
    wrong = [row for row in rows if row.status in (RED, FAILED)]
    for same in group_by(wrong, lambda row: (row.status, row.reason)):
        where = ", ".join(f"{row.backend} S={row.seq_len} {row.mode}" for row in same)
        reason = same[0].reason.replace("\n", "\n    ")
        yield Text(f"{_STATUS_WORDS[same[0].status]}: {where}\n    {reason}", style=_STYLES[same[0].status])


def _end_to_end(verdicts: Iterable[EndToEnd]) -> Iterator[Text]:
    """Yield the verdicts on whole models. Backends with the same verdict share one line."""
    for same in group_by(verdicts, lambda gate: (gate.family, gate.seq_len, gate.gradients, gate.status)):
        first = same[0]
        word = "within the error budget" if first.status == OK else _STATUS_WORDS[first.status]
        mode = "forward+backward" if first.gradients else "forward"
        names = ", ".join(verdict.backend for verdict in same)
        where = f"end to end, {first.family} at S={first.seq_len}, {mode}"
        yield Text(f"{where}: {names}: {word}", style=_STYLES.get(first.status, "dim"))
