"""The command lines in README.md and docs/ have existing commands, options and make targets."""

from __future__ import annotations

import re
import shlex

import pytest
import typer

from attnzoo.cli.app import app
from tests.docs.pages import PAGES, ROOT, blocks_of, name_of

GENERATED = ("results.md", "matrix.md", "architectures.md")  # tests of the benchmarks parse their commands
LINES = [
    pytest.param(line.split("#")[0].strip(), id=f"{name_of(page)}: {line}")
    for page in PAGES
    if page.name not in GENERATED
    for text in (
        *(block.text for block in blocks_of(page) if block.language == "bash"),
        *re.findall(r"`(attnzoo [a-z][^`]*|make [a-z-]+)`", page.read_text(encoding="utf-8")),
    )
    for line in text.splitlines()
    if line.startswith(("attnzoo ", "make ", "python examples/"))
]


@pytest.mark.parametrize("line", LINES)
def test_command_line_exists(line):
    program, *words = shlex.split(line)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in words if "=" not in target)
    elif program == "python":
        assert (ROOT / words[0]).exists()
    else:
        command = typer.main.get_command(app).commands[words[0]]
        if len(words) > 1:  # a command without arguments is only named
            command.make_context(words[0], words[1:])  # parses the options, and runs nothing
