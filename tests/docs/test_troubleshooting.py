"""docs/guide/troubleshooting.md has an entry for every error class, and for every field of a refusal."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

import attnzoo
from attnzoo import errors, testing
from tests.docs.pages import DOCS, ROOT

PAGE = (DOCS / "guide" / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^### `([^`]+)`$", PAGE, flags=re.M)
CLASSES = {
    name
    for module in (attnzoo, errors, testing)
    for name, value in vars(module).items()
    if inspect.isclass(value) and issubclass(value, errors.AttnzooError)
}


def refusal_fields():
    """The first arguments of all calls ``Refusal(field, ...)``, and of ``check(field, ...)`` in ``Capabilities``."""
    for path in (*(ROOT / "attnzoo").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        local = {"Refusal", "check"} if path == ROOT / "attnzoo" / "backend.py" else {"Refusal"}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in local and call.args:
                yield from values_of(call.args[0], tree)


def values_of(argument, tree):
    """The strings that an argument may be: a constant, or a variable of a loop over constants."""
    if isinstance(argument, ast.Constant):
        yield argument.value
    for loop in (node for node in ast.walk(tree) if isinstance(node, ast.For)):
        target = loop.target.elts[0] if isinstance(loop.target, ast.Tuple) else loop.target
        if isinstance(argument, ast.Name) and getattr(target, "id", "") == argument.id:
            for item in ast.walk(loop.iter):
                if isinstance(item, ast.Constant) and isinstance(item.value, str):
                    yield item.value


FIELDS = sorted(set(refusal_fields()))


def test_fields_of_refusals_are_read_from_the_source():
    assert {"dtype", "bias", "dropout", "attention probabilities", "value_dim", "torch.func transform"} <= set(FIELDS)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_class_has_an_entry(name):
    assert name in ENTRIES


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_refusal_has_an_entry(field):
    assert field in ENTRIES


def test_no_entry_is_about_something_that_does_not_exist():
    assert set(ENTRIES) == CLASSES | set(FIELDS)
    assert len(ENTRIES) == len(set(ENTRIES))


def test_words_of_patch_errors_are_words_of_the_source():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "attnzoo").rglob("*.py")]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # a message may be split over several lines
    table = PAGE[PAGE.index("### `PatchError`") : PAGE.index("### `DriftError`")]
    phrases = re.findall(r"^\| `([^`]+)` \|", table, flags=re.M)
    assert phrases and not [
        phrase for phrase in phrases if not all(part.strip() in joined for part in phrase.split("..."))
    ]
