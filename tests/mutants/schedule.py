"""The tests of a mutant, in the order to run them."""

from __future__ import annotations

from functools import cache

from tests.mutants.mutations import ROOT, Mutant
from tests.mutants.nearest import nearest_tests
from tests.mutants.reach import Places, Reach, places


class Schedule:
    """Orders the tests of a mutant by the record of what tests execute, or by name if there is no record."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach

    def tests(self, mutant: Mutant, seconds: float) -> tuple[list[str], list[str]]:
        """Return the tests to run first, and the tests for the case that these do not fail.

        The first tests are those that execute the changed statement, cheapest first, for about ``seconds`` of CPU time.
        The other tests that execute the statement follow, and then all test files, nearest first.
        """
        known = _places(mutant.path)
        executing = [test for test in self._reach.tests_of(mutant.path, mutant.line, known) if _exists(test)]
        files = nearest_tests(mutant.path)
        total, number = 0.0, 0
        while number < len(executing) and total < seconds:
            total += self._reach.seconds[executing[number]]
            number += 1
        return (executing[:number], [*executing[number:], *files]) if executing else (files, [])

    def executes(self, mutant: Mutant) -> bool:
        """Return whether a test executes the changed statement, as far as the record knows."""
        return self._reach.executes(mutant.path, mutant.line, _places(mutant.path))


@cache
def _places(path: str) -> Places:
    return places((ROOT / path).read_text())


def _exists(test: str) -> bool:
    file, _, function = test.partition("::")
    return f"def {function.rpartition('::')[2]}(" in _text(file)


@cache
def _text(file: str) -> str:
    path = ROOT / file
    return path.read_text() if path.exists() else ""
