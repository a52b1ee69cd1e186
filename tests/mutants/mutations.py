"""The faults that can be planted: each is one small change of one source file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst

# mutmut documents its commands only. Its commands mutate no decorated function, and many of our functions are
# decorated, so this module applies mutmut's operators itself. `test_mutants.py` checks the operators that it relies on.
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parents[2]

# The core, the judges, the backends and the adapters. Printed text is not in this list: reports, tables, commands.
SCOPE = (
    "adapters/*.py",
    "attnzoo/adapter.py",
    "attnzoo/backend.py",
    "attnzoo/functional.py",
    "attnzoo/registry.py",
    "attnzoo/auto/*.py",
    "attnzoo/backends/**/*.py",
    "attnzoo/conformance/*.py",
    "attnzoo/originals/*.py",
    "attnzoo/patching/*.py",
    "attnzoo/spec/*.py",
    "attnzoo/tuning/race.py",
    "attnzoo/verification/*.py",
    "benchmarks/contenders.py",
    "benchmarks/rows.py",
    "benchmarks/witness.py",
    "benchmarks/worker.py",
)
PRINTED_TEXT = ("attnzoo/verification/report_text.py",)
# Calls that make a message for a person, or a name for type checkers. Tests compare the parts of a message that matter.
_TEXTS = ("Error", "Refusal", "warn", "TypeVar")


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        path: the source file, relative to the root of the repository.
        line: number of the first changed line.
        before: the changed lines of the original, without indentation.
        after: the same lines of the mutant.
        code: the whole mutated file.
    """

    path: str
    line: int
    before: str
    after: str
    code: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}\n  - {self.before}\n  + {self.after}"


def source_files() -> list[str]:
    """Return the files in :data:`SCOPE`, relative to the root of the repository."""
    paths = {path.relative_to(ROOT).as_posix() for pattern in SCOPE for path in ROOT.glob(pattern)}
    return sorted(paths.difference(PRINTED_TEXT))


@dataclass(frozen=True, eq=False)
class Change:
    """One node of a source file and the node that replaces it."""

    path: str
    module: libcst.Module
    node: libcst.CSTNode
    replacement: libcst.CSTNode

    def mutant(self) -> Mutant | None:
        """Return the mutant, or None if the mutated file is not valid Python or means the same as the original."""
        source, code = self.module.code, self.module.deep_replace(self.node, self.replacement).code
        try:
            same = _meaning(code) == _meaning(source)
        except SyntaxError:
            return None
        return None if same else Mutant(self.path, *_difference(source, code), code)


def _meaning(code: str) -> str:
    """Return the syntax tree as text, without the argument ``strict`` of zip, which only guards against errors."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
    return ast.dump(tree)


def changes_of(path: str) -> Iterator[Change]:
    """Yield the changes of a source file that mutmut's operators make."""
    module = libcst.parse_module((ROOT / path).read_text())
    visitor = _Visitor()
    module.visit(visitor)
    for node, replacement in visitor.pairs:
        yield Change(path, module, node, replacement)


def _difference(source: str, code: str) -> tuple[int, str, str]:
    """Return the number of the first line that differs, and the lines that differ, before and after."""
    old, new = source.splitlines(), code.splitlines()
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    before, after = (lines[start : len(lines) - end] for lines in (old, new))
    return start + 1, *(" ".join(line.strip() for line in lines) for lines in (before, after))


class _Visitor(libcst.CSTVisitor):
    """Collect pairs (node, changed node). Annotations, decorators, docstrings and messages do not change."""

    def __init__(self) -> None:
        self.pairs: list[tuple[libcst.CSTNode, libcst.CSTNode]] = []

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, libcst.Annotation | libcst.Decorator | libcst.Assert | libcst.ImportFrom | libcst.Import):
            return False
        if isinstance(node, libcst.Expr) and isinstance(node.value, libcst.SimpleString | libcst.ConcatenatedString):
            return False
        if isinstance(node, libcst.Call) and _name(node.func).endswith(_TEXTS):
            return False
        if isinstance(node, libcst.BaseString) and not _is_word(node):
            return False
        if isinstance(node, libcst.AnnAssign) and _name(node.annotation.annotation) == "bool":
            return True  # None in place of False changes nothing; False becomes True below
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                self.pairs += [(node, changed) for changed in operator(node)]
        return True


def _name(node: libcst.BaseExpression) -> str:
    if isinstance(node, libcst.Attribute):
        return node.attr.value
    return node.value if isinstance(node, libcst.Name) else ""


def _is_word(node: libcst.BaseString) -> bool:
    """Return whether a string is a name, such as a key or an option. Other strings are text for a person."""
    return isinstance(node, libcst.SimpleString) and str(node.evaluated_value).isidentifier()
