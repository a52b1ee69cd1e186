"""Which tests execute which statement: recorded once, and used to run the right tests on a mutant first.

The record decides the order of the tests, and an outdated record makes a run slower. Every function is stored with a
hash of its text. If a function has changed since, its tests are ordered by name only.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """A statement: the function that contains it (empty outside of functions), and its line, counted from ``def``."""

    function: str
    line: int


@dataclass(frozen=True)
class Places:
    """The statements of a source file.

    Attributes:
        of_line: the innermost statement of each line.
        hashes: a hash of the text of each function.
    """

    of_line: dict[int, Place]
    hashes: dict[str, str]


def places(code: str) -> Places:
    """Return the statements of a source text."""
    result = Places({}, {})
    _visit(ast.parse(code), code.splitlines(), Place("", 0), "", result)
    return result


def _visit(node: ast.AST, lines: list[str], function: Place, prefix: str, result: Places) -> None:
    """Add the statements under a node. ``function`` is the function around it and the number of its first line."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            start = min([child.lineno, *(d.lineno for d in getattr(child, "decorator_list", ()))])
            for line in range(start, (child.end_lineno or start) + 1):  # statements inside come later and overwrite
                result.of_line[line] = Place(function.function, start - function.line)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name = prefix + child.name
            result.hashes[name] = text_hash("\n".join(lines[child.lineno - 1 : child.end_lineno]))
            _visit(child, lines, Place(name, child.lineno), f"{name}.", result)
        elif isinstance(child, ast.ClassDef):
            _visit(child, lines, function, f"{prefix}{child.name}.", result)
        else:
            _visit(child, lines, function, prefix, result)


def text_hash(text: str) -> str:
    """Return a short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Reach:
    """The record: which tests execute which statement.

    A test is a test function with all its parameters, as ``file::function`` or ``file::Class::function``.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # CPU seconds of each test
        self.hashes: dict[str, str] = {}  # of the text of each test file
        self._functions: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._texts: set[tuple[str, str, str]] = set()
        self._statements: dict[tuple[str, str, str, int], set[str]] = defaultdict(set)

    @classmethod
    def load(cls, path: Path) -> Reach:
        """Return the record in a file, or an empty record if there is no file. Each line has one test file."""
        reach = cls()
        rows = path.read_text().splitlines() if path.exists() else []
        latest = {row["file"]: row for row in map(json.loads, rows)}
        for row in latest.values():
            reach._add(row)
        return reach

    def _add(self, row: dict) -> None:
        tests = list(row["seconds"])
        self.seconds.update(row["seconds"])
        self.hashes[row["file"]] = row["hash"]
        for source, functions in row["reached"].items():
            for name, (digest, statements) in functions.items():
                self._texts.add((source, name, digest))
                for line, numbers in statements.items():
                    executed = {tests[number] for number in numbers}
                    self._functions[source, name] |= executed
                    self._statements[source, name, digest, int(line)] |= executed

    def tests_of(self, source: str, line: int, known: Places) -> list[str]:
        """Return the tests that execute a line of a source file, cheapest first.

        For a line outside of functions, and for a function that has changed since the tests were recorded, these are
        the tests that execute any function of the file, or the function.
        """
        place = known.of_line.get(line, Place("", 0))
        if not place.function:
            tests = set().union(*(tests for (path, _), tests in self._functions.items() if path == source))
        else:
            tests = self._statements.get((source, place.function, known.hashes[place.function], place.line), set())
            tests = tests or self._functions.get((source, place.function), set())
        return sorted(tests, key=lambda test: (self.seconds[test], test))

    def executes(self, source: str, line: int, known: Places) -> bool:
        """Return False if no test executes a line, according to the record.

        A line outside of functions counts as executed, and so does a line of a function that has changed since.
        """
        place = known.of_line.get(line, Place("", 0))
        text = (source, place.function, known.hashes.get(place.function, ""))
        has_changed = text not in self._texts and bool(self._functions.get((source, place.function)))
        return not place.function or has_changed or bool(self._statements.get((*text, place.line)))
