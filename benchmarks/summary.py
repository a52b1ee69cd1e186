"""The results kept in the repository as one page of documentation: ``make docs-results`` writes it.

Numbers in the documentation are copied by this module alone, from the JSON a shootout left behind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from attnzoo.benchmarks import rows as status
from attnzoo.benchmarks.contenders import ORIGINAL
from attnzoo.benchmarks.report import duration, size
from attnzoo.benchmarks.rows import Row, Shootout
from attnzoo.errors import InvalidArgumentError

INTRODUCTION = """\
# Results

Made by `make docs-results` from the JSON under `benchmarks/results/`, a folder for each machine and state; do not edit.

Each line is one contender of a shootout against the original model in the same run, after its correctness gate. *Time*
is the median of runs that take turns with those of the other contenders, with the fastest and the slowest of them.
*Speed* is the original's median over it, *memory* its extra peak over the original's. Scope `attention` is one module's
time less that of its projections.

Where the original fills gigabytes, much of its time is the machine's to hand out memory. On a virtual machine that had
just started, originals took twice their later time or more, and contenders that need little memory hardly longer:
folders whose name ends in `just-started` are from there and flatter the latter. Compare lines of one folder.

In folders whose name ends in `shared`, other programs ran on the same cores: read memory there, not time or speed."""
_COLUMNS = ("S", "contender", "kernel executed", "time", "speed", "peak", "memory")
_RIGHT = {"S", "time", "speed", "peak", "memory"}


def page(folder: Path) -> str:
    """The page in Markdown.

    Args:
        folder: of folders of JSON, one per machine.

    Raises:
        InvalidArgumentError: there is none in it, or one has rows with wrong numbers.
    """
    files = sorted(folder.glob("*/*.json"))
    if not files:
        raise InvalidArgumentError("folder", f"{folder}, with no JSON a folder below it", "results by machine")
    lines, machine = [INTRODUCTION], ""
    results = [(path, Shootout.read(path)) for path in files]
    # Whole models first: they are what people run.
    results.sort(key=lambda one: (one[0].parent.name, one[1].plan["scope"] != "model", one[0].name))
    for path, found in results:
        if not found.ok:
            raise InvalidArgumentError("folder", f"{path}, which has red or failed rows", "results with green gates")
        if machine != (machine := f"## `{path.parent.name}`: {_machine(found)}"):
            lines += ["", machine]
        for family, scope, mode in dict.fromkeys((row.family, row.scope, row.mode) for row in found.rows):
            rows = [row for row in found.rows if (row.family, row.scope, row.mode) == (family, scope, mode)]
            lines += ["", f"### {family}, {scope}, {mode}", "", f"`{command(found)}`", "", *_table(rows)]
    return "\n".join(lines)


def _machine(found: Shootout) -> str:
    plan, versions = found.plan, found.versions
    where = versions["gpu"] if plan["device"] == "cuda" else f"{versions['cpu']}, {plan['threads']} thread(s)"
    return f"{where}: {plan['dtype']}, torch {versions['torch']}, transformers {versions['transformers']}"


def command(found: Shootout) -> str:
    """What to type for the same shootout."""
    plan = found.plan
    words = ["attnzoo bench", *_option("model", plan["families"]), f"--scope {plan['scope']}"]
    words += [f"--dtype {plan['dtype']}", f"--device {plan['device']}", f"--threads {plan['threads']}"]
    words += [*_option("seq-len", plan["seq_lens"]), *_option("backend", plan["backends"] or ())]
    if len(plan["modes"]) == 1:
        words.append("--train" if plan["modes"][0] else "--no-train")
    if not plan.get("original", True):  # results from before there was the option have the original
        words.append("--no-original")
    if plan.get("layers"):
        words.append(f"--layers {plan['layers']}")
    words += [f"--batch {plan['batch']}", *(_option("rounds", [plan["rounds"]]) if plan["rounds"] else ())]
    return " ".join(words)


def _option(name: str, values: Iterable[object]) -> list[str]:
    return [f"--{name} {value}" for value in values]


def _table(rows: list[Row]) -> Iterator[str]:
    yield _line(_COLUMNS)
    yield _line("--:" if column in _RIGHT else "---" for column in _COLUMNS)
    for row in rows:
        if row.status == status.OK:
            yield _line(_cells(row))
    notes = dict.fromkeys(f"S = {row.seq_len}: {row.note}." for row in rows if row.note)
    if notes:
        yield from ("", *notes)


def _cells(row: Row) -> tuple[str, ...]:
    spread = f"{duration(row.seconds)} ({duration(row.fastest)} to {duration(row.slowest)})"
    kernel = (row.kernel or "-").removeprefix("original ")
    if row.backend == ORIGINAL:
        return (str(row.seq_len), "original", kernel, spread, "1", size(row.peak_bytes), "1")
    speed, memory = (f"{ratio:.2f}x" if ratio is not None else "-" for ratio in (row.speedup, row.peak_ratio))
    return (str(row.seq_len), f"`{row.backend}`", kernel, spread, speed, size(row.peak_bytes), memory)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
