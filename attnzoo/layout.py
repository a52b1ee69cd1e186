"""Text that fits the terminal.

Text wraps at spaces only. A word that is longer than a line stays whole, because people copy paths, names and commands
from the terminal.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def width() -> int:
    """Return the columns of the terminal, or ``COLUMNS`` of the environment; 80 if neither is known, as in a pipe."""
    return shutil.get_terminal_size().columns


def fit(text: str, columns: int | None = None) -> str:
    """Wrap the lines of a text that are longer than ``columns`` (None: the width of the terminal).

    Each line keeps its indentation; its continuation lines are indented by two more columns.
    """
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines += _wrap(line.lstrip(), indent, f"{indent}  ", columns) or [""]
    return "\n".join(lines)


def aligned(rows: Iterable[Sequence[str]], indent: int = 0) -> str:
    """Align rows of cells in columns, with ``indent`` free columns on the left.

    The last cell wraps. It moves below its row if a word does not fit beside the row.
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
    """Group the items with equal keys, in the order in which the keys first appear."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def heading(names: Sequence[str], cls: str, pattern: str) -> str:
    """Return a title for a group of sites: the first name, the number of further sites, their class and pattern."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} ({cls}, {pattern})"
