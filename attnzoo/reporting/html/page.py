"""Write a :class:`~attnzoo.reporting.html.content.Page` as one HTML file that loads nothing from a network.

All text is escaped, because names and reasons come from JSON files. A content security policy lets the browser run only
the scripts whose hashes are in the page, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from attnzoo.reporting.html.content import Chart, Page, Section, Table
from attnzoo.reporting.html.engine import javascript

_FOLDER = Path(__file__).parent


def render(page: Page) -> str:
    """Return the page as HTML. Raise InvalidArgumentError if the package for charts is missing."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    scripts = [javascript(), (_FOLDER / "page.js").read_text(encoding="utf-8")]
    # 'unsafe-eval' is for Vega, which compiles the expressions of the specifications. These come from `charts.py`.
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes} 'unsafe-eval'"
    specs = [chart.spec for section in page.sections for chart in section.charts]
    data = {"series": list(page.colours.items()), "specs": _finite(specs)}
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(page.title)}: attnzoo report</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            "<main>",
            *_head(page),
            *(line for section in _numbered(page.sections) for line in section),
            *_origin(page),
            "</main>",
            f'<script type="application/json" id="data">{_json(data)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(data: Any) -> str:
    """Return JSON in which no text can end the surrounding script element."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    """Return plain data in which None replaces Inf and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _head(page: Page) -> Iterator[str]:
    yield f"<header><p class=kicker>attnzoo report</p><h1>{escape(page.title)}</h1>"
    yield f"<p class=subtitle>{escape(page.subtitle)}</p>"
    yield f'<p class="verdict {"good" if page.ok else "bad"}">{escape(page.verdict)}</p></header>'
    if page.highlights:
        tiles = (f"<li><b>{escape(number)}</b> {escape(meaning)}</li>" for number, meaning in page.highlights)
        yield f"<ul class=highlights>{''.join(tiles)}</ul>"
    yield "<fieldset class=series><legend>Show</legend>"
    for number, name in enumerate(page.series):
        box = f'<input type=checkbox checked data-series="{number}">'
        yield f'<label>{box}<i class=swatch data-series="{number}"></i>{escape(name)}</label>'
    yield "</fieldset>"


def _numbered(sections: Iterable[Section]) -> Iterator[Iterator[str]]:
    first_chart = 0
    for section in sections:
        yield _section(section, first_chart)
        first_chart += len(section.charts)


def _section(section: Section, first_chart: int) -> Iterator[str]:
    yield f"<section><h2>{escape(section.title)}</h2>"
    if section.charts:
        yield "<div class=charts>"
        for number, chart in enumerate(section.charts, first_chart):
            yield _figure(chart, number)
        yield "</div>"
    for table in section.tables:
        yield from _table(table)
    yield from (f"<p class=note>{escape(note)}</p>" for note in section.notes)
    for summary, text in section.details:
        yield f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
    yield "</section>"


def _figure(chart: Chart, number: int) -> str:
    caption = f"<figcaption><b>{escape(chart.title)}</b> {escape(chart.explanation)}</figcaption>"
    return f'<figure>{caption}<div class=chart data-chart="{number}"></div></figure>'


def _table(table: Table) -> Iterator[str]:
    """Yield a table. On a narrow screen each row becomes a card, whose labels are in ``data-label``."""
    options = "".join(f'<option value="{number}">{escape(name)}</option>' for number, name in enumerate(table.columns))
    order = '<button type=button class=direction aria-label="Reverse the order">&#8645;</button>'
    yield '<div class=tablebox><p class=sorter><label>Sort by <select><option value="">the order of the run</option>'
    yield f"{options}</select></label>{order}</p><table><thead><tr>"
    for name in table.columns:
        kind = " class=number" if name in table.numeric else ""
        yield f"<th scope=col{kind} aria-sort=none><button type=button>{escape(name)}</button></th>"
    yield "</tr></thead><tbody>"
    for series, cells in table.rows:
        yield f'<tr data-name="{escape(series)}">'
        for name, cell in zip(table.columns, cells, strict=True):
            classes = " ".join([*(["number"] if name in table.numeric else []), *([cell.mark] if cell.mark else [])])
            text = escape(cell.text)
            if name not in table.numeric:  # long names of modules and kernels may break after dots and underscores
                text = re.sub(r"(?<=[._:,])(?=[a-z])", "<wbr>", text)
            order = "" if cell.order is None else f' data-order="{escape(str(cell.order))}"'
            bar = "" if cell.bar is None else f'<meter min=0 max=1 value="{min(1.0, max(0.0, cell.bar)):.3f}"></meter>'
            yield f'<td class="{classes}" data-label="{escape(name)}"{order}>{bar}<span>{text}</span></td>'
        yield "</tr>"
    yield "</tbody></table></div>"


def _origin(page: Page) -> Iterator[str]:
    yield "<section><h2>Where these numbers come from</h2>"
    if page.commands:
        yield f"<pre class=commands>{escape(chr(10).join(page.commands))}</pre>"
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in page.facts)
    yield f"<dl class=facts>{facts}</dl></section>"
