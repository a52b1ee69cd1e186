"""The tests of a mutant, in the order to run them."""

from __future__ import annotations

from functools import cache

from tests.mutants.mutations import ROOT, Mutant
from tests.mutants.nearest import group_of, nearest_tests, test_files
from tests.mutants.reach import Places, Reach, places, text_hash

# Numbers of test files in the first batches. To collect all files takes longer than the tests that catch most mutants.
_FILES = (3, 6)


class Schedule:
    """Orders the tests of a mutant by the record of what tests execute, or by name if there is no record."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach

    def batches(self, mutant: Mutant) -> list[list[str]]:
        """Return the tests to run, as lists for one run of pytest each.

        First come the tests that execute the changed statement: those in the nearest and cheapest files, then all
        others. The last batches are all test files, nearest first.
        """
        tests = self._reach.tests_of(mutant.path, mutant.line, _places(mutant.path))
        by_file: dict[str, list[str]] = {}
        for test in filter(_exists, tests):
            by_file.setdefault(test.partition("::")[0], []).append(test)

        def cost(file: str) -> tuple[int, float]:
            return group_of(mutant.path, file), sum(map(self._reach.seconds.__getitem__, by_file[file]))

        executing = [by_file[file] for file in sorted(by_file, key=cost)]
        files = [[file] for file in nearest_tests(mutant.path)]
        return [*_joined(executing), *_joined(files)]

    def executes(self, mutant: Mutant) -> bool:
        """Return False if no test executes the changed statement. Return True without a complete, present record."""
        is_present = all(self._reach.hashes.get(file) == text_hash(_text(file)) for file in test_files())
        return not is_present or self._reach.executes(mutant.path, mutant.line, _places(mutant.path))


def _joined(groups: list[list[str]]) -> list[list[str]]:
    """Join the tests of the first files, of the next files, and of all other files."""
    stops = [sum(_FILES[:number]) for number in range(len(_FILES) + 1)]
    parts = (groups[start:stop] for start, stop in zip(stops, [*stops[1:], None], strict=True))
    return [[test for group in part for test in group] for part in parts if part]


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
