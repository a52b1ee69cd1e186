"""Functions that wrap and align text to the width of the terminal.

Text wraps only at spaces. Words longer than a line are not split, because users copy paths, names and commands.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def width() -> int:
    """Return the number of columns: ``COLUMNS`` if set, else the width of the terminal, else 80."""
    return shutil.get_terminal_size().columns


def fit(text: str, columns: int | None = None) -> str:
    """Wrap the lines of a text that are longer than ``columns``. None means the width of the terminal.

    Each line keeps its indentation. Continuation lines are indented by two more columns.
    """
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines += _wrap(line.lstrip(), indent, f"{indent}  ", columns) or [""]
    return "\n".join(lines)


def aligned(rows: Iterable[Sequence[str]], indent: int = 0) -> str:
    """Align rows of cells in columns, and indent every row by ``indent`` spaces.

    The last cell of a row wraps. If a word of this cell does not fit after the other cells, the cell starts a new line.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = []
    for *cells, last in rows:
        head = " " * indent + "".join(f"{cell:<{size}}  " for cell, size in zip(cells, widths, strict=True))
        fits = len(head) + max(map(len, last.split()), default=0) <= width()
        if not (fits and last):
            lines.append(head.rstrip())
            head = " " * (indent + 2)
        lines += _wrap(last, head, " " * len(head))
    return "\n".join(lines)


def _wrap(text: str, first_indent: str, indent: str, columns: int | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        width() if columns is None else columns,
        initial_indent=first_indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def group_by(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Return lists of the items with equal keys, in the order in which the keys first appear."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def heading(names: Sequence[str], cls: str, pattern: str) -> str:
    """Return a title for a group of sites: the first name, the number of further sites, the class and the pattern."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} ({cls}, {pattern})"
