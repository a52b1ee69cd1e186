"""The pages of the documentation, and the code blocks on a page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))

_BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        language: the word after the three backticks.
        title: the name of a file if the page says that the block is a file (``title="my_backend.py"``), else "".
        text: the code.
        line: number of lines before the code.
    """

    language: str
    title: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """Return the code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in _BLOCK.finditer(text):
        indent, language, rest, code = match.groups()
        title = _TITLE.search(rest)
        lines = text.count("\n", 0, match.start(4))
        blocks.append(Block(language, title[1] if title else "", re.sub(f"^{indent}", "", code, flags=re.M), lines))
    return blocks


def name_of(page: Path) -> str:
    """Return the path of a page, relative to the root of the repository."""
    return str(page.relative_to(ROOT))
