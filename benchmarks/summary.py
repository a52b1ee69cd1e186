"""Print the page docs/results.md from JSON files of results. ``make docs-results`` runs this module.

No other module copies numbers into the documentation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from attnzoo.benchmarks.gpu.prediction import page as predictions
from attnzoo.benchmarks.gpu.prediction import stored
from attnzoo.benchmarks.rows import OK, Row, Shootout
from attnzoo.benchmarks.tables import duration, notes, overhead, ratio, size
from attnzoo.errors import InvalidArgumentError
from attnzoo.layout import group_by
from attnzoo.reporting.matrix_text import markdown_row

INTRODUCTION = """\
# Results

`make docs-results` writes this page from the JSON files in `benchmarks/results/`. Do not edit it. Each folder there
holds the results of one machine in one state. The last section predicts times on a GPU. A prediction is no measurement.

Each table is one run of the shootout, and each line is one contender: the original model, a backend, or the attention
of another library. A table lists only backends whose numbers passed the correctness gate.

- **S**: input length in tokens.
- **kernel**: the code that computed the attention.
- **time**: median of the timed runs, then the fastest and the slowest run. The contenders of a table run alternately,
  so that noise of the machine affects all contenders equally.
- **speed**: time of the original divided by the time of this line. Above 1x is faster than the original.
- **peak**: memory that a run needs in addition to weights and inputs.
- **memory**: peak of this line divided by the peak of the original. Below 1x is less than the original.

The scope names the timed code. `model` is the whole model. `module` is one self-attention module with its projections.
`attention` is one self-attention module without the time of its projections. `overhead` is the CPU time of one call of
a self-attention module, and `decode` is the CPU time per token of greedy decoding after a prompt of S tokens. In these
two scopes, `counting` is the original model with the patch `native`, and the column **overhead** is the CPU time above
the original's for each attention module.

Compare lines of the same folder only:

- Folders that end in `-just-started`: the virtual machine had just started, and memory allocation was slow. The
  original models need gigabytes and took twice the usual time or more. The speeds are therefore too favourable.
- Folders that end in `-shared`: other programs ran on the same cores. Only the memory is reliable in these folders.
- Folders that end in `-cpu-time`: other programs ran on the same machine, so the times are CPU time (`--clock cpu`).
  CPU time does not count the time in which other programs run. These programs still share the caches and the memory."""
_COLUMNS = ("S", "contender", "kernel", "time", "speed", "peak", "memory")
_LEFT_COLUMNS = ("contender", "kernel")


def page(folder: Path) -> str:
    """Return the page as Markdown.

    ``folder`` contains one folder of JSON files for each machine, and the counts for the predictions if there are any.
    """
    results = [(path, Shootout.read(path)) for path in folder.glob("*/*.json")]
    if not results:
        raise InvalidArgumentError(
            "folder", f"{folder}, where no JSON file matches */*.json", "a folder with such files"
        )
    for path, shootout in results:
        if not shootout.ok:
            raise InvalidArgumentError("folder", f"{path}, which has red or failed rows", "results without such rows")
    # Whole models come first, because users run whole models.
    results.sort(key=lambda result: (result[0].parent.name, result[1].plan["scope"] != "model", result[0].name))
    lines, heading = [INTRODUCTION], ""
    for path, shootout in results:
        first, versions = shootout.rows[0], shootout.versions
        software = f"torch {versions['torch']}, transformers {versions['transformers']}"
        if heading != (heading := f"## `{path.parent.name}`: {first.hardware}: {first.dtype}, {software}"):
            lines += ["", heading]
        for rows in group_by(shootout.rows, lambda row: (row.family, row.scope, row.mode)):
            title = f"### {rows[0].family}, {rows[0].scope}, {rows[0].mode}"
            lines += ["", title, "", f"`{command(shootout)}`", "", *_table(rows)]
    if (folder / stored.FILE).exists():
        lines += ["", *predictions.lines(*stored.read(folder / stored.FILE))]
    return "\n".join(lines)


def command(shootout: Shootout) -> str:
    """Return the command line that runs ``shootout`` again."""
    plan = shootout.plan
    words = ["attnzoo bench", *_options("model", plan["families"])]
    words += [f"--{name} {plan[name]}" for name in ("scope", "dtype", "device", "threads")]
    words += [*_options("seq-len", plan["seq_lens"]), *_options("backend", plan["backends"] or ())]
    if len(plan["modes"]) == 1:
        words.append("--train" if plan["modes"][0] else "--no-train")
    if not plan.get("original", True):  # older result files lack this option; they include the original
        words.append("--no-original")
    words += _options("layers", [plan["layers"]] if plan.get("layers") else [])
    words += ["--clock cpu"] if plan.get("clock") == "cpu" else []  # older result files lack this option
    words += [f"--batch {plan['batch']}", *_options("rounds", [plan["rounds"]] if plan["rounds"] else [])]
    return " ".join(words)


def _options(name: str, values: Iterable[object]) -> list[str]:
    return [f"--{name} {value}" for value in values]


def _table(rows: list[Row]) -> Iterator[str]:
    measures_host = any(row.overhead is not None for row in rows)
    columns = (*_COLUMNS, "overhead") if measures_host else _COLUMNS
    yield markdown_row(columns)
    yield markdown_row("---" if column in _LEFT_COLUMNS else "--:" for column in columns)
    for row in rows:
        if row.status == OK:
            yield markdown_row((*_cells(row), overhead(row)) if measures_host else _cells(row))
    if notes(rows):
        yield from ("", *notes(rows))


def _cells(row: Row) -> tuple[str, ...]:
    times = f"{duration(row.seconds)} ({duration(row.fastest)} to {duration(row.slowest)})"
    contender = row.label if row.is_original else f"`{row.label}`"
    ratios = ratio(row, row.speedup), size(row.peak_bytes), ratio(row, row.peak_ratio)
    return (str(row.seq_len), contender, row.kernel_label, times, *ratios)


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
