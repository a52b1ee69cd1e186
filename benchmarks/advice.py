"""Print the page docs/guide/which-backend.md from JSON files of results. ``make docs-advice`` runs this module.

The page names the fastest measured backend for each model, length and mode, and says where no backend is faster than
the model's own code.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from attnzoo.benchmarks.rows import OK, Row, Shootout
from attnzoo.errors import InvalidArgumentError
from attnzoo.layout import group_by
from attnzoo.reporting.matrix_text import markdown_row

LEAST_SPEED = 1.03  # as in attnzoo.tune: a smaller difference is noise
LARGEST_MEMORY = 0.9  # a backend that is not faster is still worth it below this share of the original's memory
MODES = {"forward": "inference", "forward+backward": "training"}

INTRODUCTION = """\
# Which backend should I take?

<!-- `make docs-advice` writes this page from the JSON files in `benchmarks/results/`. Do not edit it. -->

## The short answer

| you want | take |
|---|---|
| the fastest code for each call | `auto`, after one `attnzoo.tune(model, inputs)` on your machine |
| a long document in LED, Longformer, LongT5, Pegasus-X, BigBird or Reformer on a CPU | `sdpa` |
| training of these models on a CPU, without dropout of softmax weights | `sdpa` |
| training with this dropout (the default of LongT5, Longformer, Reformer) on a CPU | `auto`, after `attnzoo.tune` |
| GPT-NeoX, GPTBigCode, Llama and other models that transformers already runs on `sdpa` | `auto`, which keeps the \
model's own code |
| attention probabilities, or a result to compare with | `eager` |
| less memory and time for a long input of a dense model, and another result | `blocked-local` or `lsh`: \
[window and sinks](window-and-sinks.md) |
| a GPU | `auto`, after `attnzoo.tune` there; the section [CUDA](#cuda) says what was measured |

`auto` without measurements runs a backend only where the authors measured a gain. For dtypes and sizes that nobody
measured, `auto` may miss a gain. [Usage](usage.md#auto) shows `tune`, which measures.

## Whole models

Each line is one measured case. **take** is the fastest backend that passed the correctness gate. It is `auto` where no
backend was 3 % faster than the model's own code or saved 10 % of the memory: `auto` then runs the model's own code.
**speed** is the time of the original divided by the time of the backend. **memory** is the peak of the backend divided
by the peak of the original, both over weights and inputs. An empty speed means that other programs disturbed the clock.
[Results](../results.md) has every number with its range and its command.

Training rows are without dropout of softmax weights, which e.g. LongT5, Longformer and Reformer have by default.
With it, `sdpa` runs a slower kernel on a CPU, so `auto` runs the model's own code until
`attnzoo.tune(model.train(), inputs)` has measured.
"""
PARTS = """
## Single modules

One self-attention module with its projections (`module`), or without the time of its projections (`attention`). A line
names the fastest of the measured backends, which may be fewer than all.
"""
CUDA = """
## CUDA
"""
NO_CUDA = """\
No result file in this repository is from a GPU: whole models on CUDA are not yet run. Until then, take `auto`. By rule,
`auto` runs the model's own code on CUDA, except for windows of at least 1024 keys under `flash_attention_2`. To find
out what your card prefers, run `attnzoo tune led --device cuda`, or `attnzoo.tune(model, inputs)` with your model."""
WITH_CUDA = "The tables above contain the measured GPUs. For any other card, run `attnzoo tune led --device cuda`."


class Case(NamedTuple):
    """The original row and the backend rows that one run measured in one case, and the name of the folder."""

    folder: str
    original: Row
    backends: tuple[Row, ...]

    @property
    def has_times(self) -> bool:
        """Whether the times are reliable. ``summary.INTRODUCTION`` explains the names of the folders."""
        return not self.folder.endswith("-shared")

    def best(self) -> Row:
        """Return the fastest backend, or the backend with the smallest peak if the times are not reliable."""
        return min(self.backends, key=lambda row: (row.seconds if self.has_times else row.peak_bytes) or math.inf)

    def is_worth_it(self) -> bool:
        """Whether the best backend is faster than the original or needs less memory, beyond noise."""
        best = self.best()
        faster = self.has_times and (best.speedup or 0.0) >= LEAST_SPEED
        return faster or (best.peak_ratio or 1.0) <= LARGEST_MEMORY


def page(folder: Path) -> str:
    """Return the page as Markdown. ``folder`` contains one folder of JSON files for each machine."""
    cases = sorted(read_cases(folder), key=_order)
    if not cases:
        raise InvalidArgumentError(
            "folder", f"{folder}, without a case of the original and a backend", "results with both"
        )
    whole = [case for case in cases if case.original.scope == "model"]
    parts = [case for case in cases if case.original.scope in ("module", "attention")]
    has_cuda = any(case.original.device == "cuda" for case in cases)
    cuda = CUDA + "\n" + (WITH_CUDA if has_cuda else NO_CUDA)
    return "\n".join([INTRODUCTION, *_table(whole, ()), PARTS, *_table(parts, ("scope",)), cuda])


def read_cases(folder: Path) -> Iterator[Case]:
    """Yield the cases of all result files, without those in which memory allocation was slow (``-just-started``)."""
    for path in sorted(folder.glob("*/*.json")):
        if path.parent.name.endswith("-just-started"):
            continue
        rows = [row for row in Shootout.read(path).rows if row.status == OK and not row.peer and row.recall is None]
        for of_case in group_by(rows, lambda row: (row.family, row.scope, row.mode, row.seq_len)):
            originals = [row for row in of_case if row.is_original]
            backends = tuple(row for row in of_case if not row.is_original)
            if originals and backends:
                yield Case(path.parent.name, originals[0], backends)


def _order(case: Case) -> tuple[object, ...]:
    row = case.original
    return row.family, row.scope, row.device, row.mode != "forward", row.seq_len, case.folder


def _table(cases: Iterable[Case], more: tuple[str, ...]) -> Iterator[str]:
    columns = ("model", *more, "tokens", "for", "take", "speed", "memory", "measured on")
    yield markdown_row(columns)
    yield markdown_row("--:" if column in ("tokens", "speed", "memory") else "---" for column in columns)
    for case in cases:
        original, best = case.original, case.best()
        worth = case.is_worth_it()
        speed = f"{best.speedup:.2f}x" if case.has_times and best.speedup else ""
        memory = f"{best.peak_ratio:.2f}x" if best.peak_ratio else ""
        take = f"`{best.backend}`" if worth else "`auto`"
        if not worth and case.has_times:
            speed = f"{speed} with `{best.backend}`"
        layers = " (2 layers)" if "2 layer(s)" in original.note else ""
        values = {
            "model": f"{original.family}{layers}",
            "scope": original.scope,
            "tokens": str(original.seq_len),
            "for": MODES[original.mode],
            "take": take,
            "speed": speed,
            "memory": memory,
            "measured on": f"{original.hardware}, {original.dtype} (`{case.folder}`)",
        }
        yield markdown_row(values[column] for column in columns)


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
