"""``attnzoo bench``: run a shootout, print its tables, and write its JSON and PNG files."""

from __future__ import annotations

import datetime
import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from attnzoo.benchmarks.families import FAMILIES
from attnzoo.cli import completion
from attnzoo.cli.output import STDOUT, require_writable
from attnzoo.cli.progress import progress_bar
from attnzoo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from attnzoo.benchmarks.rows import Shootout

FOLDER = Path("shootout")
_MODEL_HELP = f"Model family, repeatable: {', '.join(FAMILIES)}."


def bench(
    model: list[str] = typer.Option(["led"], help=_MODEL_HELP, autocompletion=completion.families),
    backend: list[str] = typer.Option(
        None,
        help="Backend, repeatable, with options as name:option=value,...; default: every exact backend.",
        autocompletion=completion.backends,
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
    json: str | None = typer.Option(
        None,
        "--json",
        metavar="FILE",
        help="JSON file to write; - prints the JSON instead of tables; default: shootout/<name>.json.",
    ),
    plot: Path | None = typer.Option(None, "--plot", help="PNG file to write; default: beside the JSON file."),
    no_plot: bool = typer.Option(False, "--no-plot", help="Write no PNG file."),
) -> None:
    """Time the original model and every backend on real text, after a correctness check of every backend.

    If a backend computes wrong numbers or does not run as requested, its row has no speed, and the exit code is 1.
    attnzoo report makes a page of the JSON file.
    """
    from rich.console import Console

    from attnzoo.benchmarks import runner
    from attnzoo.benchmarks.options import make_plan
    from attnzoo.benchmarks.plots import require_matplotlib
    from attnzoo.benchmarks.tables import show

    plan = make_plan(
        model, backend, seq_len, dtype=dtype, device=device, threads=threads, train=train, scope=scope, rounds=rounds,
        batch=batch, full=full, peers=peers, original=original, layers=layers, clock=clock,
    )  # fmt: skip
    if plot is not None and no_plot:
        raise InvalidArgumentError("plot", f"{plot} with --no-plot", "at most one of --plot and --no-plot")
    if plot is not None:
        require_matplotlib()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    default = FOLDER / f"{'+'.join(plan.families)}-{plan.scope}-{stamp}.json"
    json_path = None if json == STDOUT else Path(json or default)
    plot_path = plot
    if plot is None and json_path is not None and not no_plot:
        plot_path = json_path.with_suffix(".png")
    for option, path in (("json", json_path), ("plot", plot_path)):
        if path is not None:
            require_writable(option, path)
    with progress_bar() as progress:
        shootout = runner.run(plan, progress)
    # Standard output is for the JSON alone if it is requested there.
    console = Console(stderr=json_path is None)
    if json_path is None:
        print(json_format.dumps(asdict(shootout), indent=1))
    else:
        shootout.write(json_path)
        show(shootout, console)
        console.print(f"\n{shootout.seconds:.0f} s in total; JSON: {json_path}", highlight=False, soft_wrap=True)
    if plot_path is not None:
        _draw(shootout, plot_path, console, required=plot is not None)
    if not shootout.ok:
        raise typer.Exit(1)


def _draw(shootout: Shootout, path: Path, console: Console, required: bool) -> None:
    from attnzoo.benchmarks.plots import draw

    try:
        paths = draw(shootout, path)
    except InvalidArgumentError as error:
        if required:
            raise
        console.print(f"no plots: {error}", style="yellow", highlight=False, markup=False)
        return
    console.print(f"plots: {', '.join(map(str, paths))}", highlight=False, soft_wrap=True)
