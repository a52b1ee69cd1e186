"""The tests of a source file, nearest first. A mutant runs them in this order until one fails."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from tests.mutants.mutations import ROOT

# Slow tests, tests of texts, and tests that install packages or do not run the source of the working tree.
_LEFT_OUT = (
    *("tests/mutants/", "tests/plugin/", "tests/test_packaging.py", "tests/test_plugin.py", "tests/docs/"),
    *("tests/test_layout.py", "tests/test_spelling.py"),
    "tests/backends/triton/interpreted/",  # tests/backends/triton/test_interpreted.py runs them in a suitable process
)
# Tests of everything together, for faults that the nearest tests do not catch: for each folder of the source, the test
# files to run first.
_BROAD = {
    "adapters/": (
        "tests/models/test_every_family",
        "tests/models/test_every_term",
        "tests/models/test_attentions",
        "tests/models/test_masks",
        "tests/models/test_generation",
        "tests/models/",
        "tests/adapters/",
        "tests/patching/",
    ),
    "attnzoo/patching/": ("tests/patching/", "tests/models/test_every_family", "tests/models/", "tests/adapters/"),
    "attnzoo/adapter.py": ("tests/patching/", "tests/models/test_every_family", "tests/adapters/"),
    "attnzoo/backends/triton/": ("tests/backends/triton/test_interpreted", "tests/backends/triton/", "tests/backends/"),
    "attnzoo/conformance/": ("tests/conformance/", "tests/backends/"),
    "attnzoo/originals/": ("tests/patching/", "tests/originals/"),
    "": (
        "tests/properties/test_backends",
        "tests/backends/",
        "tests/properties/",
        "tests/conformance/",
        "tests/models/",
    ),
}


def nearest_tests(source: str) -> list[str]:
    """Return all test files, relative to the root, in the order in which a mutant of a source file runs them.

    First come the tests with the name of the source file, then the tests that share a word of the name or import the
    file, then the tests of its folder, then tests of everything together.
    """
    return sorted(test_files(), key=lambda test: (*_distance(source, test), test))


def group_of(source: str, test: str) -> int:
    """Return how near a test file is to a source file: 0 for the tests of the source file, 3 for unrelated tests."""
    path, name = Path(source), Path(test).stem.removeprefix("test_")
    folder = path.parts[1] if len(path.parts) > 2 else path.parts[0]
    near = folder == "attnzoo" or folder in Path(test).parts
    imports = _module(source) in _imports(test)
    words, test_words = ({word.rstrip("s") for word in stem.split("_")} for stem in (path.stem, name))
    if words <= test_words and near:
        return 0
    if words <= test_words or ((imports or words & test_words) and near):
        return 1
    return 2 if imports else 3


def _distance(source: str, test: str) -> tuple[int, int, int]:
    starts = next(starts for start, starts in _BROAD.items() if source.startswith(start))
    broad = next((i for i, start in enumerate(starts) if test.startswith(start)), len(starts))
    return group_of(source, test), broad, len(_imports(test))


def _module(source: str) -> str:
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("attnzoo") else f"attnzoo.{name}"


@cache
def test_files() -> tuple[str, ...]:
    """Return the test files that mutants run, relative to the root."""
    paths = (path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
    return tuple(path for path in paths if not path.startswith(_LEFT_OUT))


@cache
def _imports(test: str) -> frozenset[str]:
    """Return the modules that a test file imports, and the modules that its helpers in ``tests`` import."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / test).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return frozenset(names)
