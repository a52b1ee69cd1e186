"""Text for terminals: it fits the width there is, and no word is cut.

A word longer than a line stays whole on a line by itself: people copy paths, names and commands from there.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def width() -> int:
    """Columns of the terminal, or ``COLUMNS`` of the environment; 80 where there is neither, as in a pipe."""
    return shutil.get_terminal_size().columns


def fit(text: str, columns: int | None = None) -> str:
    """A text with its long lines wrapped at spaces. Continued lines are indented by two more columns.

    Args:
        text: lines, which keep their indentation.
        columns: of the widest line; None: those of the terminal.
    """
    lines = []
    for line in text.splitlines():
        start = line[: len(line) - len(line.lstrip())]
        lines += _wrap(line.lstrip(), start, f"{start}  ", columns) or [""]
    return "\n".join(lines)


def aligned(rows: Iterable[Sequence[str]], indent: int = 0) -> str:
    """Rows of cells as columns. The last cell wraps at spaces, and goes below its row if a word has no room beside it.

    Args:
        rows: equally many cells each.
        indent: columns to leave free on the left.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = []
    for *cells, last in rows:
        head = " " * indent + "".join(f"{cell:<{size}}  " for cell, size in zip(cells, widths, strict=True))
        beside = len(head) + max(map(len, last.split()), default=0) <= width()
        if not (beside and last):
            lines.append(head.rstrip())
            head = " " * (indent + 2)
        lines += _wrap(last, head, " " * len(head))
    return "\n".join(lines)


def _wrap(text: str, first: str, others: str, columns: int | None = None) -> list[str]:
    """Lines that start with an indentation."""
    return textwrap.wrap(
        text,
        width() if columns is None else columns,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def group_by(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items with equal keys together, in the order in which their keys first appear."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def heading(names: Sequence[str], cls: str, pattern: str) -> str:
    """Sites that are alike, in words: the first by name, how many more there are, and what they have in common."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} ({cls}, {pattern})"
