"""``attnzoo verify``: compare a patched model with the original, on passages of real text."""

from __future__ import annotations

import datetime
from typing import Annotated, Any

import typer

import attnzoo
from attnzoo.cli import completion
from attnzoo.cli.output import Json, command_line, emit, require_json_target
from attnzoo.cli.progress import progress_bar
from attnzoo.cli.tune import MODEL_HELP


def verify(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=MODEL_HELP, autocompletion=completion.families)],
    backend: Annotated[
        str,
        typer.Option(
            help="Backend to verify, with options as name:option=value,...; or native.",
            autocompletion=completion.backends,
        ),
    ] = "sdpa",
    seq_len: Annotated[int, typer.Option(help="Tokens per passage.", min=1)] = 256,
    passages: Annotated[int, typer.Option(help="Number of passages, which are checked separately.", min=1)] = 2,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the weights.  [default: the stored dtype]")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Check one passage of at most 256 tokens, in seconds.")] = False,
    gradients: Annotated[bool, typer.Option(help="Compare gradients, too.")] = True,
    json: Json = None,
) -> None:
    """Compare a patched model with the original. The exit status is 1 if an error is larger than the error budget."""
    from attnzoo.benchmarks.named_models import load_with_passages
    from attnzoo.registry import RESERVED_NAMES
    from attnzoo.spelling import configured, named_dtype
    from attnzoo.verification.excerpt import LENGTH
    from attnzoo.verification.reports import Passages

    require_json_target(json)
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
    emit(lambda: {"model": model, **report.to_dict(), **_circumstances(context)}, lambda: report, json)
    if not report.ok:
        raise typer.Exit(1)


def _circumstances(context: typer.Context) -> dict[str, Any]:
    """Return what a reader of the JSON needs to run the command again: command line, versions and machine, and time."""
    from attnzoo.benchmarks.measure import machine

    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"command": command_line(context), "versions": machine("cpu"), "created": created}
