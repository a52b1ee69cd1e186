"""The reference describes every name that attnzoo exports, and the site shows every page."""

from __future__ import annotations

import re

import attnzoo
from tests.docs.pages import DOCS, ROOT

REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))


def test_every_exported_name_is_in_the_reference():
    described = re.findall(r"^::: attnzoo\.(\w+)$", REFERENCE, flags=re.M)
    assert sorted(described) == sorted(set(described))
    assert set(described) == set(attnzoo.__all__)


def test_the_conformance_kit_is_in_the_reference():
    described = re.findall(r"^::: attnzoo\.testing\.(\w+)$", REFERENCE, flags=re.M)
    assert set(described) == set(attnzoo.testing.__all__)


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
