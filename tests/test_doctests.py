"""The examples in docstrings run and give what they show, and every exported function has one."""

import doctest
import importlib
import inspect
import itertools
from pathlib import Path

import pytest

import attnzoo
from attnzoo.conformance import kit
from attnzoo.conformance.cases import cases
from tests.support.uncompiled_flex import uncompiled_flex

ROOT = Path(__file__).parent.parent
FOLDERS = {"attnzoo": "attnzoo", "adapters": "attnzoo.adapters", "benchmarks": "attnzoo.benchmarks"}


def modules_with_examples():
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                yield ".".join((package, *parts)).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_give_what_they_show(name, isolated_registry, monkeypatch):
    # Examples of the kit run a sample of its cases. tests/conformance/test_kit.py runs all cases on the same backends.
    monkeypatch.setattr(kit, "cases", lambda dtypes: itertools.islice(cases(dtypes), 0, None, 17))
    module = importlib.import_module(name)
    with uncompiled_flex():  # the example of tune times it, too
        failed, attempted = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert attempted, "doctest does not see the examples: are they in a docstring of a public object of the module?"
    assert not failed, "see the captured output"


def test_every_exported_function_has_an_example():
    exported = {name: getattr(attnzoo, name) for name in attnzoo.__all__}
    functions = {name for name, value in exported.items() if inspect.isroutine(value)}
    assert not {name for name in functions if ">>> " not in (exported[name].__doc__ or "")}
