"""The option ``--json`` of every command, and checks of output files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from attnzoo.errors import InvalidArgumentError

STDOUT = "-"
JSON_HELP = "Also write the result as JSON to this file; - prints the JSON instead of text."
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help=JSON_HELP)]


def emit(data: Callable[[], Any], text: Callable[[], object], target: str | None) -> None:
    """Print ``text()``, and write ``data()`` as JSON to ``target``. If ``target`` is ``-``, print only the JSON."""
    if target != STDOUT:
        print(text())
    if target is not None:
        write_json(data(), target)


def write_json(data: Any, target: str) -> None:
    """Write ``data`` as JSON to the file ``target``, or to standard output if ``target`` is ``-``.

    Raise InvalidArgumentError if the file cannot be written.
    """
    content = json.dumps(data, indent=2)
    if target == STDOUT:
        print(content)
        return
    require_writable("json", Path(target))
    Path(target).write_text(content + "\n", encoding="utf-8")


def require_json_target(target: str | None) -> None:
    """Raise InvalidArgumentError if ``emit`` could not write to ``target``. Call this before long measurements."""
    if target is not None and target != STDOUT:
        require_writable("json", Path(target))


def require_writable(option: str, path: Path) -> None:
    """Create the folder of an output file. Raise InvalidArgumentError if the file cannot be written."""
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise InvalidArgumentError(option, f"{path}: {error.strerror}", "a path that can be written") from error
    if not existed:
        path.unlink()


def command_line(context: typer.Context) -> str:
    """Return the command line of a running command: arguments, and options with other values than the defaults.

    The option ``--json`` is left out, because it does not change the result.
    """
    words = ["attnzoo", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if value == parameter.default or parameter.name == "json":
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [parameter.opts[-1], str(value)]
    return shlex.join(words)
