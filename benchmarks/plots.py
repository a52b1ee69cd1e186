"""Plot time, memory and error of a shootout over the input length, in one row of three panels for each mode.

    python -m attnzoo.benchmarks.plots RESULT.json PICTURE.png

draws only time and memory, for the first page of the documentation (``make docs-plot``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnzoo.benchmarks.rows import OK, Row, Shootout
from attnzoo.benchmarks.tables import SCOPE_TITLES, duration, size
from attnzoo.errors import InvalidArgumentError
from attnzoo.layout import group_by

# Okabe and Ito's colours, which readers with any colour vision can distinguish.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7A3E9D")
_MARKERS = "osD^vPX*"
_GREY = "#444444"


def require_matplotlib() -> None:
    """Raise InvalidArgumentError if matplotlib cannot be imported. The message names the remedies."""
    try:
        import matplotlib  # noqa: F401
    except (Exception, SystemExit) as error:
        got = f"a plot, but matplotlib cannot be imported ({type(error).__name__}: {error})"
        raise InvalidArgumentError("plot", got, "no plot (--no-plot), or pip install 'attnzoo[plots]'") from error


def draw(shootout: Shootout, path: Path) -> tuple[Path, ...]:
    """Draw one PNG file per family and return the paths. For several families, file names end in ``-<family>``."""
    require_matplotlib()
    path.parent.mkdir(parents=True, exist_ok=True)
    by_family = {rows[0].family: rows for rows in group_by(shootout.rows, lambda row: row.family)}
    targets = {name: path if len(by_family) == 1 else path.with_stem(f"{path.stem}-{name}") for name in by_family}
    for family, rows in by_family.items():
        _draw_family(rows, targets[family])
    return tuple(targets.values())


def draw_front(shootout: Shootout, path: Path) -> None:
    """Draw time and memory of the first family and mode side by side, for the first page of the documentation."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in group_by(shootout.rows, lambda row: (row.family, row.mode))[0] if row.status == OK]
    figure = Figure(figsize=(7.2, 3.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    time_axis, memory_axis = figure.subplots(1, 2)
    lines: dict[str, Any] = {}
    for number, of_label in enumerate(group_by(rows, lambda row: row.label)):
        style, lengths = _style(of_label[0], number), [row.seq_len for row in of_label]
        lines[of_label[0].label] = _draw_time(time_axis, of_label, style)
        memory_axis.plot(lengths, [row.peak_bytes or 0 for row in of_label], **style)
        last = of_label[-1]
        if not last.is_original and last.peak_ratio:
            _annotate(memory_axis, f"{last.peak_ratio:.2f}x", last.seq_len, last.peak_bytes or 0, style["color"])
    first, lengths = rows[0], sorted({row.seq_len for row in rows})
    clock = "CPU time" if shootout.plan.get("clock") == "cpu" else "time"
    _decorate(time_axis, f"{clock} of one {first.mode}", "median and range", lengths, duration)
    _decorate(memory_axis, "peak memory", "in addition to weights and inputs", lengths, size)
    layers = shootout.plan.get("layers")
    shown = f"{SCOPE_TITLES[first.scope]}{f' with {layers} layers in each stack' if layers else ''}"
    figure.suptitle(f"{first.family.upper()}, {shown}, {first.dtype}, {first.hardware}", fontsize=11)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_family(rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_mode = group_by(rows, lambda row: row.mode)
    figure = Figure(figsize=(13.5, 0.9 + 3.7 * len(by_mode)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(by_mode), 3, squeeze=False)
    by_backend = sorted(group_by(rows, lambda row: row.backend), key=lambda same: not same[0].is_original)
    styles = {same[0].label: _style(same[0], number) for number, same in enumerate(by_backend)}
    lines: dict[str, Any] = {}
    for of_mode, (time_axis, memory_axis, error_axis) in zip(by_mode, grid, strict=True):
        ok_rows = [row for row in of_mode if row.status == OK]
        for label, style in styles.items():
            of_label = [row for row in ok_rows if row.label == label]
            if of_label:
                lines.setdefault(label, _draw_time(time_axis, of_label, style))
                memory_axis.plot([row.seq_len for row in of_label], [row.peak_bytes or 0 for row in of_label], **style)
                _draw_error(error_axis, [row for row in of_label if row.error is not None], style)
        mode, lengths = of_mode[0].mode, sorted({row.seq_len for row in ok_rows})
        _decorate(time_axis, f"{mode}: time", "median and range", lengths, duration)
        _decorate(memory_axis, f"{mode}: peak memory", "in addition to weights and inputs", lengths, size)
        _decorate(error_axis, f"{mode}: error (dashed: budget)", "largest difference from float64", lengths, None)
        if all(row.error is None for row in ok_rows):
            error_axis.text(0.5, 0.5, "nothing to compare", ha="center", va="center", transform=error_axis.transAxes)
    first = rows[0]
    figure.suptitle(
        f"{first.checkpoint}, {SCOPE_TITLES[first.scope]}\n{first.dtype}, batch {first.batch}, {first.hardware}, "
        f"torch {first.versions['torch']}, transformers {first.versions['transformers']}",
        fontsize=11,
    )
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path)


def _style(row: Row, number: int) -> dict[str, Any]:
    if row.is_original:
        return dict(color=_GREY, marker="o", linewidth=2.2, markersize=6)
    index = (number - 1) % len(_COLOURS)
    return dict(color=_COLOURS[index], marker=_MARKERS[(index + 1) % len(_MARKERS)], linewidth=2.0, markersize=6)


def _draw_time(axis: Any, rows: list[Row], style: dict[str, Any]) -> Any:
    x, colour, last = [row.seq_len for row in rows], style["color"], rows[-1]
    axis.fill_between(x, [row.fastest for row in rows], [row.slowest for row in rows], color=colour, alpha=0.15)
    (line,) = axis.plot(x, [row.seconds for row in rows], **style)
    if not last.is_original and last.speedup is not None:
        _annotate(axis, f"{last.speedup:.1f}x", last.seq_len, last.seconds or 0.0, colour)
    return line


def _annotate(axis: Any, text: str, x: float, y: float, colour: str) -> None:
    axis.annotate(
        text, (x, y), xytext=(0, -14), textcoords="offset points", ha="center", fontsize=9, color=colour
    )  # fmt: skip


def _draw_error(axis: Any, rows: list[Row], style: dict[str, Any]) -> None:
    if not rows:
        return
    lengths, marker = [row.seq_len for row in rows], "_" if len(rows) == 1 else ""
    axis.plot(lengths, [row.error for row in rows], **style)
    dashes = dict(color=style["color"], linestyle="--", linewidth=1.2, marker=marker, markersize=12)
    axis.plot(lengths, [row.budget for row in rows], **dashes)


Unit = Callable[[float | None], str]


def _decorate(axis: Any, title: str, label: str, lengths: list[int], unit: Unit | None) -> None:
    """Set titles, scales and ticks. ``unit`` formats the y ticks. If ``unit`` is None, they are powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_title(title, fontsize=11, loc="left")
    axis.set_ylabel(label, fontsize=9)
    axis.set_xlabel("S, tokens", fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [str(length) for length in lengths])
    if unit is None:
        axis.yaxis.set_major_locator(LogLocator(10))
    else:
        axis.yaxis.set_major_locator(LogLocator(2) if unit is size else LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    axis.minorticks_off()
    axis.yaxis.set_minor_formatter(NullFormatter())
    if lengths:
        axis.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
    axis.margins(y=0.18)
    low, high = axis.get_ylim()
    if unit is None and low > 0:
        axis.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    axis.grid(True, which="both", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=9)


if __name__ == "__main__":
    draw_front(Shootout.read(Path(sys.argv[1])), Path(sys.argv[2]))
