"""The table at the end: one per family and scope, readable at 120 columns."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnzoo.benchmarks import rows as status
from attnzoo.benchmarks.contenders import ORIGINAL
from attnzoo.benchmarks.rows import Row, Shootout

_STYLES = {status.RED: "bold red", status.FAILED: "red", status.REFUSED: "yellow", status.SKIPPED: "dim"}
_VERDICTS = {status.RED: "RED", status.FAILED: "failed", status.REFUSED: "refused", status.SKIPPED: "left out"}
_NOT_JUDGED = "peer: not judged"
_SCOPES = {
    "model": "whole model",
    "module": "one self-attention module, projections included",
    "attention": "attention alone: one module, measured time of its projections taken off",
}


def render(shootout: Shootout) -> RenderableType:
    """Tables, then why rows have no numbers."""
    parts: list[RenderableType] = []
    groups = dict.fromkeys((row.family, row.scope) for row in shootout.rows)
    for family, scope in groups:
        rows = [row for row in shootout.rows if (row.family, row.scope) == (family, scope)]
        parts.append(_headline(rows[0], shootout))
        for mode in dict.fromkeys(row.mode for row in rows):
            parts.append(_table([row for row in rows if row.mode == mode], mode))
        parts += _reasons(rows)
    parts += _gates(shootout)
    return Group(*parts)


def _headline(row: Row, shootout: Shootout) -> Text:
    versions = shootout.versions
    where = versions.get("gpu") if row.device == "cuda" else f"{versions['cpu']}, {row.threads} thread(s)"
    text = Text(f"\n{row.checkpoint}: {_SCOPES[row.scope]}\n", style="bold")
    text.append(
        f"{row.dtype}, batch {row.batch}, {where}; torch {versions['torch']}, transformers {versions['transformers']}, "
        f"attnzoo {versions['attnzoo']}, Python {versions['python']}",
        style="dim",
    )
    return text


def _table(rows: list[Row], mode: str) -> Table:
    table = Table(
        title=mode,
        title_justify="left",
        title_style="italic",
        box=SIMPLE,
        padding=(0, 1),
        collapse_padding=True,
        header_style="bold",
    )
    for name in ("S", "backend", "kernel executed"):
        table.add_column(name, justify="right" if name == "S" else "left", overflow="fold")
    for name in ("median", "min - max", "speed", "peak", "memory", "error", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("gate", no_wrap=True)
    for seq_len in dict.fromkeys(row.seq_len for row in rows):
        for row in rows:
            if row.seq_len == seq_len:
                table.add_row(*_cells(row), style=_STYLES.get(row.status, ""))
        table.add_section()
    return table


def _cells(row: Row) -> tuple[str, ...]:
    name = "original" if row.backend == ORIGINAL else row.backend.replace(":", ": ").replace(",", ", ")
    head = (str(row.seq_len), name, (row.kernel or "-").removeprefix("original "))
    errors = (_exponent(row.error), _exponent(row.budget))
    if row.status != status.OK:
        return (*head, "-", "-", "-", "-", "-", *errors, _VERDICTS[row.status])
    original = row.backend == ORIGINAL
    return (
        *head,
        duration(row.seconds),
        _spread(row),
        "1" if original else _ratio(row.speedup),
        size(row.peak_bytes),
        "1" if original else _ratio(row.peak_ratio),
        *errors,
        "-" if original else _NOT_JUDGED if row.peer else _passed(row),
    )


def _passed(row: Row) -> str:
    return "ok" if row.recall is None else f"ok, recall {row.recall:.3f}"


def _spread(row: Row) -> str:
    """Fastest and slowest run, in the unit of the median."""
    if row.seconds is None or row.fastest is None or row.slowest is None:
        return "-"
    if row.seconds >= 1:
        return f"{row.fastest:.2f}-{row.slowest:.2f}"
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


def _exponent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _reasons(rows: Iterable[Row]) -> list[Text]:
    """Why rows have no numbers, equal reasons together."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status != status.OK:
            where = f"{row.backend} S={row.seq_len} {row.mode}"
            grouped.setdefault((row.status, row.reason), []).append(where)
    return [
        Text(f"{_VERDICTS[verdict]}: {', '.join(where)}\n    {reason}", style=_STYLES.get(verdict, ""))
        for (verdict, reason), where in grouped.items()
    ]


def _gates(shootout: Shootout) -> list[Text]:
    lines = [
        Text(
            "\nspeed: the original's median over the row's, above 1 is faster. peak: memory on top of weights and "
            "inputs; "
            "memory: over the original's, below 1 is less. error, budget: of the check closest to its budget, "
            "against the float64 oracle.",
            style="dim",
        )
    ]
    if any(row.recall is not None for row in shootout.rows):
        lines.append(
            Text(
                "recall: the backend changes the pattern, and is judged with that change; the keys still seen hold "
                "this share of full attention's weight.",
                style="dim",
            )
        )
    if any(row.peer for row in shootout.rows):
        lines.append(
            Text(
                "peer: another library's attention on random tensors of the same sizes; it computes something slightly "
                "different, so its numbers are not judged.",
                style="dim",
            )
        )
    for verdict in shootout.end_to_end:
        word = "within the error rule" if verdict.status == status.OK else _VERDICTS[verdict.status]
        what = "forward+backward" if verdict.gradients else "forward"
        lines.append(
            Text(
                f"end to end, {verdict.family} at S={verdict.seq_len}, {verdict.backend}, {what}: {word}",
                style=_STYLES.get(verdict.status, "dim"),
            )
        )
    return lines


def show(shootout: Shootout, console: Console) -> None:
    """Print the tables."""
    console.print(render(shootout), soft_wrap=False)
