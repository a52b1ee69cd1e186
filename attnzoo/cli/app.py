"""The ``attnzoo`` command and its subcommands. All output fits the terminal width: see :mod:`attnzoo.layout`.

A command imports what it needs when it runs. So help, errors in options and shell completion do not wait for torch.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import attnzoo
from attnzoo.cli import completion
from attnzoo.cli.bench import bench
from attnzoo.cli.fingerprint import fingerprint
from attnzoo.cli.output import STDOUT, Json, emit
from attnzoo.cli.report import report
from attnzoo.cli.run import CONTEXT, run
from attnzoo.cli.tune import MODEL_HELP, tune
from attnzoo.cli.verify import verify
from attnzoo.errors import AttnzooError, InvalidArgumentError
from attnzoo.layout import aligned, fit, group_by


class _Commands(TyperGroup):
    """Command group that shows the first paragraph of each command's help. Click would show only the first line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for command in self.commands.values():
            command.short_help = (command.help or "").partition("\n\n")[0]
        super().format_commands(ctx, formatter)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # typer's boxes cut words in narrow terminals
    pretty_exceptions_enable=False,
)


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
def doctor(json: Json = None) -> None:
    """Show what this machine can run. For everything else, show the reason and what to install."""
    from dataclasses import asdict

    from attnzoo.reporting.doctor import examine

    findings = examine()

    def text() -> str:
        lines = []
        for group in group_by(findings, lambda finding: finding.kind):
            rows = [(finding.name, "yes" if finding.ok else "no", finding.detail) for finding in group]
            lines += [group[0].kind, aligned(rows, indent=2)]
        return "\n".join(lines)

    emit(lambda: [asdict(finding) for finding in findings], text, json)


@app.command()
def matrix(
    model_types: Annotated[list[str] | None, typer.Argument(help="Model types to show.  [default: all]")] = None,
    json: Json = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show which backends, devices, dtypes and features work at each attention module (the support matrix)."""
    from attnzoo.reporting import matrix_text
    from attnzoo.reporting.matrix import families, matrix_to_dict

    if json == STDOUT and markdown:
        raise InvalidArgumentError("json", "- with --markdown", "a file, or no --markdown: both would be printed")
    modules = families(tuple(model_types or ()))
    text = matrix_text.markdown if markdown else matrix_text.text
    emit(lambda: matrix_to_dict(modules), lambda: text(modules), json)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, autocompletion=completion.families)],
    backend: Annotated[
        str | None,
        typer.Option(
            help="Only this backend, with options as name:option=value,... Without it, or with auto: all backends.",
            autocompletion=completion.backends,
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Show which backends would run at each attention of a model, and which backend auto selects and why."""
    from attnzoo.benchmarks.named_models import load_model
    from attnzoo.spelling import parse

    name, options = (None, {}) if backend is None or backend == "auto" else parse(backend)
    explanation = attnzoo.explain(load_model(model), name, **options)
    emit(explanation.to_dict, lambda: explanation, json)


app.command()(verify)
app.command()(tune)
app.command()(bench)
app.command()(report)
app.command()(fingerprint)
app.command(context_settings=CONTEXT)(run)


def main() -> None:
    """Run the ``attnzoo`` command. For errors of attnzoo, print only the message, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the encoding of the terminal may lack a character
    try:
        app(prog_name="attnzoo")  # also for python -m attnzoo, whose completion would get another name
    except AttnzooError as error:
        print(fit(f"attnzoo: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
