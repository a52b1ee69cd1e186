"""``attnzoo run``: run a Python program whose models use a backend of attnzoo, without an edit to the program."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

import attnzoo
from attnzoo.cli import completion
from attnzoo.cli.output import STDOUT, require_json_target, write_json
from attnzoo.errors import AttnzooError, InvalidArgumentError

# Options after the name of the program belong to the program.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def run(
    context: typer.Context,
    program: Annotated[str, typer.Argument(help="Python file to run or, with -m, a module. Its arguments follow.")],
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is the name of a module.")] = False,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Backend of models that the program builds without attn_implementation, as a name or "
            "name:option=value,...  [default: the variable ATTNZOO_BACKEND]",
            autocompletion=completion.backends,
        ),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="When the program ends, write attnzoo.stats(), the kernel calls by backend, as JSON to this file; "
            "- is standard output.",
        ),
    ] = None,
) -> None:
    """Run a Python program after attnzoo.install(), e.g. attnzoo run --backend sdpa train.py --epochs 3.

    Processes that the program starts are not included. Start them with this command, e.g. torchrun -m attnzoo run
    train.py.
    """
    if not module and not Path(program).is_file():
        raise InvalidArgumentError("program", repr(program), "a Python file, or with -m the name of a module")
    require_json_target(json)
    target = json if json in (None, STDOUT) else str(Path(json).resolve())  # the program may change the current folder
    attnzoo.install(backend)
    sys.argv = [program, *context.args]
    # As for `python program.py` and `python -m module`, imports begin in the program's folder or the current folder.
    sys.path.insert(0, "" if module else str(Path(program).resolve().parent))
    try:
        if module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except AttnzooError:  # the command prints errors of attnzoo without the line of the program
        traceback.print_exc()
        raise typer.Exit(1) from None
    finally:
        if target is not None:
            write_json(attnzoo.stats(), target)
