"""Pages of ``attnzoo report`` for tests, and what a browser would read in them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

SCRIPT = "window.vegaEmbed = 'a stand-in for Vega'"


def without_vega(monkeypatch):
    """Replace Vega by a short script. Making the real one takes seconds."""
    from attnzoo.reporting.html import page

    monkeypatch.setattr(page, "javascript", lambda: SCRIPT)


class Parsed(HTMLParser):
    """The elements of a page, as the parser of a browser sees them: tags with attributes, and text outside scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.scripts, self._open = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "wbr":  # a place where a word may break, not an end of the word
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif self.texts and self.tags[-1][0] == "wbr":
            self.texts[-1] += data
        elif not self._open or self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    @property
    def data(self):
        """The JSON that the script of the page reads."""
        (number,) = [n for n, (tag, attributes) in enumerate(self.of("script")) if attributes.get("id") == "data"]
        return json.loads(self.scripts[number])

    def of(self, tag):
        return [(name, attributes) for name, attributes in self.tags if name == tag]


def specifications(page):
    return [chart.spec for section in page.sections for chart in section.charts]
