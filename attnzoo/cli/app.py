"""The command line: ``attnzoo doctor``, ``matrix``, ``verify``, ``explain``, ``tune``, ``fingerprint``, ``bench``.

Everything it prints fits the terminal: see :mod:`attnzoo.layout`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from typer.core import TyperGroup

import attnzoo
from attnzoo.cli.fingerprint import fingerprint
from attnzoo.cli.tune import tune
from attnzoo.errors import AttnzooError
from attnzoo.layout import aligned, alike, fit


class _Commands(TyperGroup):
    """Lists commands with the whole first paragraph of their help, where click cuts it to a line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for command in self.commands.values():
            command.short_help = (command.help or "").partition("\n\n")[0]
        super().format_commands(ctx, formatter)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # typer's boxes cut words in narrow terminals
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"attnzoo {attnzoo.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """A pluggable attention-backend registry for Hugging Face models."""


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can run, and for what it cannot: why, and what to install."""
    from attnzoo.reporting.doctor import examine, to_dicts

    findings = examine()
    if as_json:
        print(json.dumps(to_dicts(findings), indent=2))
        return
    for group in alike(findings, lambda finding: finding.kind):
        print(group[0].kind)
        print(aligned([(finding.name, "yes" if finding.ok else "no", finding.detail) for finding in group], indent=2))


@app.command()
def matrix(
    model_types: Annotated[list[str] | None, typer.Argument(help="Only these; none: all with an adapter.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Which backend runs at which attention module, in which dtype, on what, with what; and for the rest: why not."""
    from attnzoo.reporting import matrix_text
    from attnzoo.reporting.matrix import families

    modules = families(tuple(model_types or ()))
    print(matrix_text.markdown(modules) if markdown else matrix_text.text(modules))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A family of the shootout (see bench --help), or a local checkpoint.")],
    backend: Annotated[
        str, typer.Option(help="The backend to verify, maybe with options (name:option=value,...), or native.")
    ] = "sdpa",
    seq_len: Annotated[int, typer.Option(help="Tokens of a passage.", min=1)] = 256,
    passages: Annotated[int, typer.Option(help="Passages of the shipped text, each judged by itself.", min=1)] = 8,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default: as they are stored.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A look: one passage, no more than 256 tokens.")] = False,
    gradients: Annotated[bool, typer.Option(help="Compare gradients too.")] = True,
    as_json: Json = False,
) -> None:
    """Compare a patched model with its original under the error rule; exit status 1 if it is not within."""
    from attnzoo.benchmarks.subjects import subject_with_passages
    from attnzoo.registry import RESERVED_NAMES
    from attnzoo.spelling import configured, named_dtype
    from attnzoo.verification.excerpt import LENGTH
    from attnzoo.verification.reports import Passages
    from attnzoo.verification.verify import verify as compare

    chosen = backend if backend in RESERVED_NAMES else configured(backend)
    weights = None if dtype is None else named_dtype(dtype)
    count, length = (1, min(seq_len, LENGTH)) if fast else (passages, seq_len)
    with _progress() as progress:
        progress(0.0, f"loading {model}")
        loaded, inputs = subject_with_passages(model, length, count, weights)
        reports = []
        for number, passage in enumerate(inputs):

            def tell(done: float, what: str, number: int = number) -> None:
                progress((number + done) / count, f"passage {number + 1} of {count}: {what}" if count > 1 else what)

            reports.append(compare(loaded, passage, chosen, gradients=gradients, fast=fast, progress=tell))
    report = reports[0] if count == 1 else Passages(tuple(reports))
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    if not report.ok:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[Callable[[float, str], None]]:
    """A progress bar on stderr, if that is a terminal: a function of how much is done (0 to 1) and what is next."""
    console = Console(stderr=True)
    columns = (BarColumn(24), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda done, what: bar.update(task, completed=done, description=what)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A family of the shootout (see bench --help), or a local checkpoint.")],
    backend: Annotated[
        str | None, typer.Option(help="Only this backend, maybe with options; default: all, and what auto takes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What each backend would do at each attention module of a model, and what auto takes there and why."""
    from attnzoo.benchmarks.subjects import load
    from attnzoo.reporting.explain import explain as look
    from attnzoo.spelling import parse

    name, options = (None, {}) if backend is None or backend == "auto" else parse(backend)
    explanation = look(load(model), name, **options)
    print(json.dumps(explanation.to_dict(), indent=2) if as_json else explanation)


app.command()(tune)
app.command()(fingerprint)


def _mount() -> None:
    from attnzoo.benchmarks.cli import bench

    app.command()(bench)


def main() -> None:
    """Entry point of the ``attnzoo`` command; attnzoo's own errors print as one message without a traceback."""
    _mount()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the encoding lacks must not end the command
    try:
        app()
    except AttnzooError as error:
        message = f"attnzoo: {error}"
        print(fit(message) if sys.stderr.isatty() else message, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
