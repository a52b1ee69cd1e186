"""A progress bar for long commands, on terminals only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar() -> Iterator[Callable[[float, str], None]]:
    """Yield a function ``update(done, step)`` that shows the completed share (0 to 1) and the next step in a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(stderr=True)
    step_column = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (BarColumn(24), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), step_column)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda done, step: bar.update(task, completed=done, description=step)
