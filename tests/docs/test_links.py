"""Every file that the documentation names exists."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/design.md", "docs/decisions.md", "tests/plugin/README.md")


def files():
    """Paths of the repository's files, relative to its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    return listed or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]


@pytest.mark.parametrize("page", PAGES)
def test_page_names_existing_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    known, named = files(), set(re.findall(r"`([\w./-]+\.(?:py|json|toml|md))`", text))
    assert not [name for name in sorted(named) if not any(f"/{path}".endswith(f"/{name}") for path in known)]


@pytest.mark.parametrize("page", PAGES)
def test_page_links_to_existing_files(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
