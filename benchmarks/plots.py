"""PNG plots of a shootout: time, memory and error against the input length, one row of panels per mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnzoo.benchmarks import rows as status
from attnzoo.benchmarks.contenders import ORIGINAL
from attnzoo.benchmarks.report import duration, size
from attnzoo.benchmarks.rows import Row, Shootout
from attnzoo.errors import InvalidArgumentError

# Okabe and Ito's colours, told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7A3E9D")
_MARKERS = "osD^vPX*"
_GREY = "#444444"


def require_matplotlib() -> None:
    """Raise unless plots can be drawn.

    Raises:
        InvalidArgumentError: matplotlib cannot be imported; says what to do.
    """
    try:
        import matplotlib  # noqa: F401
    except (Exception, SystemExit) as error:
        raise InvalidArgumentError(
            "plot",
            f"a plot without a working matplotlib ({type(error).__name__}: {error})",
            "pip install 'attnzoo[plots]', or --no-plot",
        ) from error


def draw(shootout: Shootout, path: Path) -> tuple[Path, ...]:
    """Draw one PNG per family.

    Args:
        shootout: what to draw.
        path: where; with several families the name gets ``-<family>``.

    Returns:
        The files written.
    """
    require_matplotlib()
    families = list(dict.fromkeys(row.family for row in shootout.rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for family in families:
        target = path if len(families) == 1 else path.with_stem(f"{path.stem}-{family}")
        _family([row for row in shootout.rows if row.family == family], target)
        written.append(target)
    return tuple(written)


def _family(rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row.mode for row in rows))
    figure = Figure(figsize=(13.5, 0.9 + 3.7 * len(modes)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(modes), 3, squeeze=False)
    names = list(dict.fromkeys(row.backend for row in rows))
    names.sort(key=lambda name: name != ORIGINAL)
    looks = {name: _look(name, number) for number, name in enumerate(names)}
    drawn: dict[str, Any] = {}
    for mode, (time_axis, memory_axis, error_axis) in zip(modes, grid, strict=True):
        of_mode = [row for row in rows if row.mode == mode]
        for name in names:
            of_name = [row for row in of_mode if row.backend == name and row.status == status.OK]
            if not of_name:
                continue
            drawn.setdefault(name, _time(time_axis, of_name, looks[name]))
            _memory(memory_axis, of_name, looks[name])
            _error(error_axis, of_name, looks[name])
        lengths = sorted({row.seq_len for row in of_mode if row.status == status.OK})
        _dress(time_axis, f"{mode}: time", "median and range", lengths, duration)
        _dress(memory_axis, f"{mode}: peak memory", "on top of weights and inputs", lengths, size)
        _dress(error_axis, f"{mode}: error (dashed: budget)", "largest difference from float64", lengths, None)
        if not any(row.error is not None and row.status == status.OK for row in of_mode):
            error_axis.text(0.5, 0.5, "nothing to compare", ha="center", va="center", transform=error_axis.transAxes)
    first = rows[0]
    scope = {"model": "whole model", "module": "self-attention module", "attention": "attention alone"}[first.scope]
    where = (
        first.versions.get("gpu") if first.device == "cuda" else f"{first.versions['cpu']}, {first.threads} thread(s)"
    )
    figure.suptitle(
        f"{first.checkpoint}, {scope}: {first.dtype}, batch {first.batch}, {where}, "
        f"torch {first.versions['torch']}, transformers {first.versions['transformers']}",
        fontsize=11,
    )
    if drawn:
        labels = ["original" if name == ORIGINAL else name for name in drawn]
        figure.legend(list(drawn.values()), labels, loc="outside lower center", ncols=len(drawn), frameon=False)
    figure.savefig(path)


def _look(name: str, number: int) -> dict[str, Any]:
    if name == ORIGINAL:
        return dict(color=_GREY, marker="o", linewidth=2.2, markersize=6)
    index = (number - 1) % len(_COLOURS)
    return dict(color=_COLOURS[index], marker=_MARKERS[(index + 1) % len(_MARKERS)], linewidth=2.0, markersize=6)


def _time(axis: Any, rows: list[Row], look: dict[str, Any]) -> Any:
    x, y = [row.seq_len for row in rows], [row.seconds for row in rows]
    axis.fill_between(x, [row.fastest for row in rows], [row.slowest for row in rows], color=look["color"], alpha=0.15)
    (line,) = axis.plot(x, y, **look)
    last = rows[-1]
    if last.backend != ORIGINAL and last.speedup is not None:
        axis.annotate(
            f"{last.speedup:.1f}x", (last.seq_len, last.seconds), xytext=(0, -14), textcoords="offset points",
            ha="center", fontsize=9, color=look["color"],
        )  # fmt: skip
    return line


def _memory(axis: Any, rows: list[Row], look: dict[str, Any]) -> None:
    axis.plot([row.seq_len for row in rows], [float(row.peak_bytes or 0) for row in rows], **look)


def _error(axis: Any, rows: list[Row], look: dict[str, Any]) -> None:
    judged = [row for row in rows if row.error is not None]
    if not judged:
        return
    x = [row.seq_len for row in judged]
    axis.plot(x, [row.error for row in judged], **look)
    marker = "_" if len(judged) == 1 else ""
    dashes = dict(color=look["color"], linestyle="--", linewidth=1.2, marker=marker, markersize=12)
    axis.plot(x, [row.budget for row in judged], **dashes)


def _dress(axis: Any, title: str, label: str, lengths: list[int], write: Callable[[float | None], str] | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_title(title, fontsize=11, loc="left")
    axis.set_ylabel(label, fontsize=9)
    axis.set_xlabel("S, tokens", fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [str(length) for length in lengths])
    if write is None:
        axis.yaxis.set_major_locator(LogLocator(10))
    else:
        axis.yaxis.set_major_locator(LogLocator(2) if write is size else LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.minorticks_off()
    axis.yaxis.set_minor_formatter(NullFormatter())
    if lengths:
        axis.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
    axis.margins(y=0.18)
    low, high = axis.get_ylim()
    if write is None and low > 0:
        axis.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    axis.grid(True, which="both", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=9)
