"""Define the command ``attnzoo bench`` with its options, and write its output files."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.plots import draw, require_matplotlib
from attnzoo.benchmarks.rows import Shootout
from attnzoo.benchmarks.runner import ShootoutPlan, run
from attnzoo.benchmarks.tables import show
from attnzoo.errors import InvalidArgumentError
from attnzoo.spelling import dtype_name

DEFAULT_LENGTHS = (1024, 2048, 4096)
HOST_LENGTHS = {"overhead": (64, 1024, 4096), "decode": (64, 1024)}
FULL_LENGTHS = (1024, 2048, 4096, 8192, 16384)
FOLDER = Path("shootout")
_WORKLOADS = f"Model family, repeatable: {', '.join(WORKLOADS)}."


def make_plan(
    models: list[str] | None = None,
    backends: list[str] | None = None,
    seq_lens: list[int] | None = None,
    *,
    dtype: str = "float32",
    threads: int | None = None,
    train: bool | None = None,
    full: bool = False,
    **fields: Any,
) -> ShootoutPlan:
    """Return the plan for options of :func:`bench`. ``fields`` are further fields of :class:`ShootoutPlan`."""
    if full:
        fields.update(seconds_per_case=60.0, dense_limit=None)
    elif not (backends or seq_lens or train) and fields.get("scope", "model") == "model":
        fields.update(train_limit=2048)  # keeps a run without options short
    scope = fields.get("scope", "model")
    if train is None and scope in HOST_LENGTHS:
        train = False
    lengths = FULL_LENGTHS if full else HOST_LENGTHS.get(scope, DEFAULT_LENGTHS)
    plan = ShootoutPlan(
        families=tuple(dict.fromkeys(models or ["led"])),
        backends=tuple(backends) if backends else None,
        seq_lens=tuple(sorted(set(seq_lens or lengths))),
        modes=(False, True) if train is None else (train,),
        dtype=dtype_name(dtype),
        threads=torch.get_num_threads() if threads is None else threads,
        **fields,
    )
    plan.contenders()  # raises for a wrong backend before the measurements start
    return plan


def bench(
    model: list[str] = typer.Option(["led"], help=_WORKLOADS),
    backend: list[str] = typer.Option(
        None, help="Backend, repeatable, with options as name:option=value,...; default: every exact backend."
    ),
    seq_len: list[int] = typer.Option(None, help="Input length in tokens, repeatable; default: 1024, 2048, 4096."),
    dtype: str = typer.Option("float32", help="float32, bfloat16, float16 or float64."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    threads: int = typer.Option(None, help="CPU threads; default: the number that torch uses."),
    train: bool = typer.Option(None, "--train/--no-train", help="Run forward+backward, or forward; default: both."),
    scope: str = typer.Option(
        "model",
        help="What is timed: model, module (attention with projections), attention (without projections), overhead "
        "(CPU time of a call of the module) or decode (CPU time per token of the model).",
    ),
    rounds: int = typer.Option(None, help="Timed runs per row; default: 3 to 9, depending on their duration."),
    batch: int = typer.Option(1, help="Passages per run."),
    full: bool = typer.Option(
        False, "--full", help="Inputs of up to 16384 tokens, more rounds, and dense backends at every length that fits."
    ),
    peers: bool = typer.Option(
        None, "--peers/--no-peers", help="Also time other libraries; default: yes in scope attention."
    ),
    original: bool = typer.Option(
        True, "--original/--no-original", help="Also time the original model, which all ratios refer to."
    ),
    layers: int = typer.Option(None, help="Layers in each stack of a whole model; default: as published."),
    clock: str = typer.Option("wall", help="wall or cpu. CPU time stays right while other programs use the machine."),
    json: Path = typer.Option(None, "--json", help="JSON file to write; default: shootout/<name>.json."),
    plot: Path = typer.Option(None, "--plot", help="PNG file to write; default: beside the JSON file."),
    no_plot: bool = typer.Option(False, "--no-plot", help="Write no PNG file."),
) -> None:
    """Time the original model and every backend on real text, after a correctness check of every backend.

    If a backend computes wrong numbers or does not run as requested, its row has no speed, and the exit code is 1.
    """
    plan = make_plan(
        model, backend, seq_len, dtype=dtype, device=device, threads=threads, train=train, scope=scope, rounds=rounds,
        batch=batch, full=full, peers=peers, original=original, layers=layers, clock=clock,
    )  # fmt: skip
    if plot is not None and no_plot:
        raise InvalidArgumentError("plot", f"{plot} with --no-plot", "at most one of --plot and --no-plot")
    if plot is not None:
        require_matplotlib()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    json_path = FOLDER / f"{'+'.join(plan.families)}-{plan.scope}-{stamp}.json" if json is None else json
    plot_path = None if no_plot else json_path.with_suffix(".png") if plot is None else plot
    _require_writable("json", json_path)
    if plot_path is not None:
        _require_writable("plot", plot_path)
    with progress_bar() as progress:
        shootout = run(plan, progress)
    console = Console()
    shootout.write(json_path)
    show(shootout, console)
    console.print(f"\n{shootout.seconds:.0f} s in total; JSON: {json_path}", highlight=False, soft_wrap=True)
    if plot_path is not None:
        _draw(shootout, plot_path, console, required=plot is not None)
    if not shootout.ok:
        raise typer.Exit(1)


def _require_writable(option: str, path: Path) -> None:
    """Raise InvalidArgumentError if the output file cannot be written."""
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise InvalidArgumentError(option, f"{path}: {error.strerror}", "a path that can be written") from error
    if not existed:
        path.unlink()


@contextmanager
def progress_bar() -> Iterator[Callable[[float, str], None]]:
    """Yield a function ``update(done, step)`` that shows the completed share (0 to 1) and the next step in a bar."""
    console = Console(stderr=True)
    step_column = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (BarColumn(24), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), step_column)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda done, step: bar.update(task, completed=done, description=step)


def _draw(shootout: Shootout, path: Path, console: Console, required: bool) -> None:
    try:
        paths = draw(shootout, path)
    except InvalidArgumentError as error:
        if required:
            raise
        console.print(f"no plots: {error}", style="yellow", highlight=False, markup=False)
        return
    console.print(f"plots: {', '.join(map(str, paths))}", highlight=False, soft_wrap=True)
