"""The ``attnzoo`` command and its subcommands. All output fits the terminal width: see :mod:`attnzoo.layout`."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import attnzoo
from attnzoo.cli.fingerprint import fingerprint
from attnzoo.cli.run import CONTEXT, run
from attnzoo.cli.tune import MODEL_HELP, tune
from attnzoo.errors import AttnzooError, InvalidArgumentError
from attnzoo.layout import aligned, fit, group_by
from attnzoo.registry import RESERVED_NAMES
from attnzoo.reporting import matrix_text
from attnzoo.reporting.doctor import examine
from attnzoo.reporting.matrix import families, matrix_to_dict
from attnzoo.spelling import configured, named_dtype, parse
from attnzoo.verification.excerpt import LENGTH
from attnzoo.verification.reports import Passages


class _Commands(TyperGroup):
    """Command group that shows the first paragraph of each command's help. Click would show only the first line."""

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


def _print_version(requested: bool) -> None:
    if requested:
        print(f"attnzoo {attnzoo.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Replace and check the attention of Hugging Face models."""


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine can run. For everything else, show the reason and what to install."""
    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    for group in group_by(findings, lambda finding: finding.kind):
        print(group[0].kind)
        print(aligned([(finding.name, "yes" if finding.ok else "no", finding.detail) for finding in group], indent=2))


@app.command()
def matrix(
    model_types: Annotated[list[str] | None, typer.Argument(help="Model types to show.  [default: all]")] = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show which backends, devices, dtypes and features work at each attention module (the support matrix)."""
    if as_json and markdown:
        raise InvalidArgumentError("format", "--json and --markdown", "at most one of --json and --markdown")
    modules = families(tuple(model_types or ()))
    if as_json:
        print(json.dumps(matrix_to_dict(modules), indent=2))
    else:
        print(matrix_text.markdown(modules) if markdown else matrix_text.text(modules))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    backend: Annotated[
        str, typer.Option(help="Backend to verify, with options as name:option=value,...; or native.")
    ] = "sdpa",
    seq_len: Annotated[int, typer.Option(help="Tokens per passage.", min=1)] = 256,
    passages: Annotated[int, typer.Option(help="Number of passages, which are checked separately.", min=1)] = 2,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the weights.  [default: the stored dtype]")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Check one passage of at most 256 tokens, in seconds.")] = False,
    gradients: Annotated[bool, typer.Option(help="Compare gradients, too.")] = True,
    as_json: Json = False,
) -> None:
    """Compare a patched model with the original. The exit status is 1 if an error is larger than the error budget."""
    from attnzoo.benchmarks.cli import progress_bar
    from attnzoo.benchmarks.named_models import load_with_passages

    chosen = backend if backend in RESERVED_NAMES else configured(backend)
    weight_dtype = None if dtype is None else named_dtype(dtype)
    count, length = (1, min(seq_len, LENGTH)) if fast else (passages, seq_len)
    with progress_bar() as progress:
        progress(0.0, f"loading {model}")
        loaded, inputs = load_with_passages(model, length, count, weight_dtype)
        reports = []
        for number, passage in enumerate(inputs):

            def show(done: float, step: str, number: int = number) -> None:
                progress((number + done) / count, f"passage {number + 1} of {count}: {step}" if count > 1 else step)

            reports.append(attnzoo.verify(loaded, passage, chosen, gradients=gradients, fast=fast, progress=show))
    report = reports[0] if count == 1 else Passages(tuple(reports))
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    backend: Annotated[
        str | None,
        typer.Option(help="Only this backend, with options as name:option=value,...  [default: all backends]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which backends would run at each attention of a model, and which backend auto selects and why."""
    from attnzoo.benchmarks.named_models import load_model

    name, options = (None, {}) if backend is None or backend == "auto" else parse(backend)
    explanation = attnzoo.explain(load_model(model), name, **options)
    print(json.dumps(explanation.to_dict(), indent=2) if as_json else explanation)


app.command()(tune)
app.command()(fingerprint)
app.command(context_settings=CONTEXT)(run)


def main() -> None:
    """Run the ``attnzoo`` command. For errors of attnzoo, print only the message, without a traceback."""
    from attnzoo.benchmarks.cli import bench

    app.command()(bench)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the encoding of the terminal may lack a character
    try:
        app()
    except AttnzooError as error:
        print(fit(f"attnzoo: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
