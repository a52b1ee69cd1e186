"""A fingerprint changes if and only if the code of a function changes."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import textwrap

import pytest

from attnzoo.originals.fingerprint import fingerprint, fingerprint_of_source
from tests.originals.sources import DIFFERENT, EQUAL, HARD, ORIGINAL, changed

PLAIN = ORIGINAL.removeprefix("@same\n")


@pytest.fixture
def module_of(tmp_path):
    """Return a function that imports source text as a module."""
    number = itertools.count()

    def make(source):
        path = tmp_path / f"source_{next(number)}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return make


@pytest.mark.parametrize(("what", "old", "new"), EQUAL, ids=[what for what, _, _ in EQUAL])
def test_layout_comments_and_docstrings_keep_the_fingerprint(what, old, new):
    assert fingerprint_of_source(changed(old, new)) == fingerprint_of_source(ORIGINAL)


@pytest.mark.parametrize(("what", "old", "new"), DIFFERENT, ids=[what for what, _, _ in DIFFERENT])
def test_code_changes_the_fingerprint(what, old, new):
    assert fingerprint_of_source(changed(old, new)) != fingerprint_of_source(ORIGINAL)


def test_different_changes_have_different_fingerprints():
    sources = [ORIGINAL, *(changed(old, new) for _, old, new in DIFFERENT)]
    assert len({fingerprint_of_source(text) for text in sources}) == len(sources)


@pytest.mark.parametrize("name", HARD)
def test_source_after_the_function_is_ignored(name):
    _, text = HARD[name]
    for rest in ("x = '''\n'''", "def g(): return f'{1}'\n", "# }'\n", "@f\nclass C: pass\n", "(1)\n"):
        assert fingerprint_of_source(text + rest) == fingerprint_of_source(text), rest


def test_indented_source_has_the_same_fingerprint():
    for indentation in ("    ", "\t", "  "):
        assert fingerprint_of_source(textwrap.indent(ORIGINAL, indentation)) == fingerprint_of_source(ORIGINAL)


def test_function_is_read_where_it_is_defined(module_of):
    inside = "class C:\n    'Doc.'\n" + textwrap.indent(PLAIN, "    ") + "    @classmethod\n    def g(cls): pass\n"
    module = module_of("x = 1\n\n\n" + PLAIN + "\n\n" + inside)
    known = fingerprint_of_source(PLAIN)
    assert fingerprint(module.f) == fingerprint(module.C.f) == fingerprint(module.C().f) == known
    assert fingerprint(module.C.g) == fingerprint_of_source("@classmethod\ndef g(cls): pass")


def test_wrapped_function_is_read_at_its_source(module_of):
    plain = module_of(PLAIN).f

    @functools.wraps(plain)
    def wrapper(*args):
        return plain(*args)

    assert fingerprint(wrapper) == fingerprint(functools.lru_cache(wrapper)) == fingerprint(plain)


@pytest.mark.parametrize(
    "function",
    [len, int, functools.partial(len), lambda: 1, "text"],
    ids=["built in", "class", "partial", "lambda", "str"],
)
def test_object_that_is_no_python_function_is_refused(function):
    with pytest.raises(TypeError, match=r"got .*; allowed: a Python function defined with def"):
        fingerprint(function)


def test_function_without_source_is_refused():
    names = {}
    exec(compile(PLAIN, "<nowhere>", "exec"), names)
    with pytest.raises(OSError, match=r"the source of the function is not available \(<nowhere>\)"):
        fingerprint(names["f"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "ends before a function begins"),
        ("# nothing\n@same\n", "ends before a function begins"),
        ("x = 1\ndef f(): pass\n", "begins with 'x = 1'"),
        ("class C:\n    def f(): pass\n", "begins with 'class C :'"),
        ("def f():\n    return 'a", "ends inside a string"),
        ("def f():\n    return '''a''\n", "ends inside a string"),
        ("def f():\n    return f'{x", "ends inside an f-string"),
        ("def f():\n    return f'{x:'\n", "ends inside an f-string"),
        ("def f():\n    return f'{\"a}'\n", "ends inside a string"),
    ],
)
def test_source_without_a_function_is_refused(source, message):
    with pytest.raises(OSError, match=message):
        fingerprint_of_source(source)
