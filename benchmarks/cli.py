"""``attnzoo bench``: the shootout from the command line."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.plots import draw, require_matplotlib
from attnzoo.benchmarks.report import show
from attnzoo.benchmarks.rows import Shootout
from attnzoo.benchmarks.runner import Plan, run
from attnzoo.errors import InvalidArgumentError
from attnzoo.spelling import dtype_name

DEFAULT_LENGTHS = (1024, 2048, 4096)
FULL_LENGTHS = (1024, 2048, 4096, 8192, 16384)
FOLDER = Path("shootout")
_WORKLOADS = f"Workload, repeatable: {', '.join(WORKLOADS)}."


def make_plan(
    models: list[str] | None = None,
    backends: list[str] | None = None,
    seq_lens: list[int] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    train: bool | None = None,
    scope: str = "model",
    rounds: int | None = None,
    batch: int = 1,
    full: bool = False,
    peers: bool | None = None,
    original: bool = True,
    layers: int | None = None,
) -> Plan:
    """The plan behind the options of the command line.

    Raises:
        InvalidArgumentError, UnknownNameError: a bad value; says what is allowed.
    """
    named = bool(backends)
    values: dict[str, Any] = dict(
        families=tuple(dict.fromkeys(models or ["led"])),
        backends=tuple(backends) if backends else None,
        seq_lens=tuple(sorted(set(seq_lens or (FULL_LENGTHS if full else DEFAULT_LENGTHS)))),
        scope=scope,
        modes=(False, True) if train is None else (train,),
        dtype=dtype_name(dtype),
        device=device,
        threads=torch.get_num_threads() if threads is None else threads,
        batch=batch,
        rounds=rounds,
        peers=peers,
        original=original,
        layers=layers,
    )
    if full:
        values.update(seconds_per_case=60.0, dense_limit=None)
    quick = not (full or named or seq_lens or train) and scope == "model"
    plan = Plan(**values, train_limit=2048 if quick else None)
    plan.contenders()
    return plan


def bench(
    model: list[str] = typer.Option(["led"], help=_WORKLOADS),
    backend: list[str] = typer.Option(None, help="Backend, repeatable, maybe with options (name:option=value,...)."),
    seq_len: list[int] = typer.Option(None, help="Input length in tokens, repeatable; default 1024, 2048, 4096."),
    dtype: str = typer.Option("float32", help="float32, bfloat16, float16 or float64."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    threads: int = typer.Option(None, help="CPU threads; default: torch's."),
    train: bool = typer.Option(None, "--train/--no-train", help="Only forward+backward / only forward; default both."),
    scope: str = typer.Option("model", help="What is timed: model, module (of attention) or attention."),
    rounds: int = typer.Option(None, help="Timed runs per row; default 3 to 9, as time allows."),
    batch: int = typer.Option(1, help="Passages per run."),
    full: bool = typer.Option(False, "--full", help="Longer inputs, more rounds, the dense oracle where it fits."),
    peers: bool = typer.Option(
        None, "--peers/--no-peers", help="Other libraries' attention too; default: in scope attention."
    ),
    original: bool = typer.Option(
        True, "--original/--no-original", help="The original too; without it no ratios, where it does not fit memory."
    ),
    layers: int = typer.Option(None, help="Layers of each stack of a whole model; default: as published."),
    json: Path = typer.Option(None, "--json", help="Where the JSON goes; default shootout/<name>.json."),
    plot: Path = typer.Option(None, "--plot", help="Where the PNG goes; default beside the JSON."),
    no_plot: bool = typer.Option(False, "--no-plot", help="Draw nothing."),
) -> None:
    """Time every backend against the original model on real text, behind a correctness gate.

    No speed is shown for wrong numbers or for a kernel that was not asked for; such a run ends with exit code 1.
    """
    plan = make_plan(
        model, backend, seq_len, dtype, device, threads, train, scope, rounds, batch, full, peers, original, layers
    )
    if plot is not None and no_plot:
        raise InvalidArgumentError("plot", f"{plot} together with --no-plot", "one of the two")
    if plot is not None:
        require_matplotlib()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    target = FOLDER / f"{'+'.join(plan.families)}-{plan.scope}-{stamp}.json" if json is None else json
    _require_writable("json", target)
    drawn = None if no_plot else target.with_suffix(".png") if plot is None else plot
    if drawn is not None:
        _require_writable("plot", drawn)
    found = _run(plan)
    console = Console()
    found.write(target)
    show(found, console)
    console.print(f"\n{found.seconds:.0f} s in all; JSON: {target}", highlight=False, soft_wrap=True)
    if drawn is not None:
        _draw(found, drawn, console, plot is not None)
    if not found.ok:
        raise typer.Exit(1)


def _require_writable(option: str, path: Path) -> None:
    """Refuse a file that cannot be written before anything is measured for it."""
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise InvalidArgumentError(option, f"{path}: {error.strerror}", "a file that can be written") from error
    if not existed:
        path.unlink()


def _run(plan: Plan) -> Shootout:
    columns = (SpinnerColumn(), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)

        def progress(done: float, text: str) -> None:
            bar.update(task, completed=done, description=text)

        return run(plan, progress)


def _draw(found: Shootout, path: Path, console: Console, asked: bool) -> None:
    try:
        written = draw(found, path)
    except InvalidArgumentError as error:
        if asked:
            raise
        console.print(f"no plots: {error}", style="yellow", highlight=False, markup=False)
        return
    console.print(f"plots: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
