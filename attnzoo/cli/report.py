"""``attnzoo report``: write the JSON of ``attnzoo bench`` or ``attnzoo verify`` as an HTML page."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnzoo.cli.output import STDOUT, Json, require_json_target, require_writable, write_json
from attnzoo.errors import InvalidArgumentError
from attnzoo.layout import fit

if TYPE_CHECKING:
    from attnzoo.reporting.html.content import Page

_ALLOWED = "a JSON file that attnzoo bench --json or attnzoo verify --json wrote"


def report(
    result: Annotated[Path, typer.Argument(metavar="RESULT.json", help="File of attnzoo bench or verify (--json).")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write.  [default: beside the JSON file]", metavar="FILE")
    ] = None,
    json: Json = None,
) -> None:
    """Make one HTML page of a result of bench or verify: tables to sort, charts, machine, versions and commands.

    The page works without a network, on wide and on narrow screens. It needs: pip install 'attnzoo[report]'.
    """
    from dataclasses import asdict

    from attnzoo.reporting.html.page import render

    page = _read(result)
    path = result.with_suffix(".html") if out is None else out
    require_json_target(json)
    require_writable("out", path)
    html = render(page)
    path.write_text(html, encoding="utf-8")
    if json != STDOUT:
        print(fit(f"{page.verdict}\npage: {path} ({len(html) / 2**20:.1f} MiB)"))
    if json is not None:
        write_json({"page": str(path), **asdict(page)}, json)


def _read(path: Path) -> Page:
    """Return the content of the page, from either kind of file."""
    from attnzoo.benchmarks import report as of_shootouts
    from attnzoo.benchmarks.rows import Shootout
    from attnzoo.reporting.html import verification

    try:
        data = json_format.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"the JSON is a {type(data).__name__}, not an object")
        if verification.is_verification(data):
            return verification.page_of(data)
        return of_shootouts.page_of(Shootout.read(path))
    except OSError as error:
        raise InvalidArgumentError("result", f"{path}: {error.strerror}", _ALLOWED) from error
    except KeyError as error:  # a result of another command, or of another version
        raise InvalidArgumentError("result", f"{path}: unknown or missing name: {error}", _ALLOWED) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # not JSON, or JSON of another form
        raise InvalidArgumentError("result", f"{path}: {type(error).__name__}: {error}", _ALLOWED) from error
