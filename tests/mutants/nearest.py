"""The tests of a source file, nearest first. A mutant runs them in this order until one fails."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from tests.mutants.mutations import ROOT

# Slow tests, or tests that install packages or do not run the source of the working tree.
_LEFT_OUT = ("tests/mutants/", "tests/plugin/", "tests/test_packaging.py", "tests/test_plugin.py", "tests/test_docs.py")
# Tests of everything together, for faults that the nearest tests do not catch.
_BROAD = (
    "tests/properties/test_backends",
    "tests/models/test_attentions",
    "tests/models/test_equivalence",
    "tests/properties/",
    "tests/adapters/",
    "tests/conformance/",
    "tests/models/",
    "tests/patching/",
)


def nearest_tests(source: str) -> list[str]:
    """Return all test files, relative to the root: first the tests that carry the name of the source file, then the
    tests that import it, then its folder, then tests of whole models, then the others."""
    return sorted(_test_files(), key=lambda test: (*_distance(source, test), test))


def _distance(source: str, test: str) -> tuple[int, int, int]:
    path = Path(source)
    folder = path.parts[1] if len(path.parts) > 2 else path.parts[0]
    folder = "" if folder == "attnzoo" else folder
    near = folder in Path(test).parts
    named = path.stem in Path(test).stem
    imports = _module(source) in _imports(test)
    broad = next((i for i, start in enumerate(_BROAD) if test.startswith(start)), len(_BROAD))
    group = 0 if named and (near or not folder) else 1 if named or (imports and near) else 2 if imports or near else 3
    return group, broad if group > 1 else 0, len(_imports(test))


def _module(source: str) -> str:
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("attnzoo") else f"attnzoo.{name}"


@cache
def _test_files() -> tuple[str, ...]:
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
