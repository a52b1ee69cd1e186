"""Compare the times and red lines of two sessions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attnzoo.benchmarks.gpu.report import NOISE, all_rows, key_of, red_lines
from attnzoo.benchmarks.gpu.results import Results
from attnzoo.benchmarks.rows import Row
from attnzoo.benchmarks.tables import duration
from attnzoo.reporting.matrix_text import markdown_row

Loaded = tuple[Mapping[str, Any], Results]


def comparison(earlier: Loaded, later: Loaded) -> str:
    """Return a Markdown table of all rows that both sessions timed, and the red lines that only one of them has.

    The speed is the earlier time divided by the later time: above 1 is faster than before. The original stands in the
    table, too. If its speed is not 1, the machines differ, or other programs ran.
    """
    return "\n".join(_lines(earlier, later)) + "\n"


def _lines(earlier: Loaded, later: Loaded) -> Iterator[str]:
    cards = [index["machine"].get("gpu", index["machine"]["cpu"]) for index, _ in (earlier, later)]
    yield "## Compared with the earlier run"
    yield from ("", cards[0] if cards[0] == cards[1] else f"Different machines: {cards[0]} before, {cards[1]} now")
    before, now = (_timed(results) for _, results in (earlier, later))
    old, new = (set(red_lines(index, results)) for index, results in (earlier, later))
    yield from ("", f"Red lines: {len(old)} before, {len(new)} now")
    yield from (f"- **new RED** {line}" for line in sorted(new - old))
    yield from (f"- mended: {line}" for line in sorted(old - new))
    yield from ("", markdown_row(("case", "contender", "before", "now", "speed", "")))
    yield markdown_row(("---", "---", "--:", "--:", "--:", "---"))
    yield from (_row(before[key], row) for key, row in now.items() if key in before)
    yield from ("", f"{len(before.keys() ^ now.keys())} rows are in one of the sessions only.")


def _timed(results: Results) -> dict[tuple[Any, ...], Row]:
    return {(key_of(row), row.backend): row for row in all_rows(results) if row.seconds is not None}


def _row(before: Row, now: Row) -> str:
    assert before.seconds is not None and now.seconds is not None
    speed = before.seconds / now.seconds
    word = "slower" if speed < 1 / NOISE else "faster" if speed > NOISE else ""
    times = duration(before.seconds), duration(now.seconds)
    return markdown_row((str(key_of(now)), now.label, *times, f"{speed:.2f}x", word))
