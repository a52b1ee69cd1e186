"""What a page shows, as plain data: facts, command lines, charts and tables. :mod:`.page` writes it as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

# Okabe and Ito's colours, which readers with any colour vision can distinguish. The first one is for the original.
COLOURS = ("#8a8a8a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#7a3e9d")


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: what the cell shows.
        order: the value by which the column is sorted. None sorts behind all values.
        mark: ``"good"`` or ``"bad"`` for a verdict, otherwise ``""``.
        bar: length of a bar behind the text, from 0 to 1. None shows no bar.
    """

    text: str
    order: float | str | None = None
    mark: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Table:
    """A sortable table.

    Attributes:
        columns: the titles. The first column names the row.
        rows: pairs of the name of a series and the cells.
        numeric: the titles of columns with numbers, which are aligned to the right.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    numeric: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart: a title, an explanation in one sentence, and a Vega-Lite specification without theme and width."""

    title: str
    explanation: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page. ``details`` are pairs of a summary and preformatted text, which the reader can unfold."""

    title: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    details: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title, subtitle: what was run.
        ok: whether everything is within the error rule.
        verdict: the verdict in one sentence.
        highlights: pairs of a number and what it means.
        facts: pairs of a name and a value: the machine, the versions, the time.
        commands: the command lines that give these results.
        series: the contenders in all charts. The reader can hide each of them.
        sections: charts, tables and notes.
    """

    title: str
    subtitle: str
    ok: bool
    verdict: str
    highlights: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]
    series: tuple[str, ...]
    sections: tuple[Section, ...]

    @property
    def colours(self) -> dict[str, str]:
        """A colour for each series. Many series share colours, in turn."""
        first, *others = COLOURS
        numbered = enumerate(self.series)
        return {name: others[(number - 1) % len(others)] if number else first for number, name in numbered}


def facts_of(versions: dict[str, str], created: str | None, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the facts about the machine, the software and the start of a run, then ``more``."""
    names = {"attnzoo": "attnzoo", "torch": "PyTorch", "transformers": "transformers", "python": "Python"}
    hardware = {"gpu": "GPU", "cuda": "CUDA", "cpu": "CPU", "platform": "platform", "source": "digest of the code"}
    facts: Iterable[tuple[str, str]] = (
        (label, versions[name]) for name, label in {**names, **hardware}.items() if name in versions
    )
    return (*facts, *([("started", created)] if created else []), *more)
