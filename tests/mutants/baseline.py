"""A test catches a mutant only if it passes without the mutant."""

from __future__ import annotations

from tests.mutants.mutations import Mutant
from tests.mutants.worker import Outcome, Worker


class Baseline:
    """Runs tests on mutants, without the tests that fail in the copy of the working tree without a mutant.

    A test that failed with a mutant is run once without the mutant. Several threads may use the same object.

    Args:
        seconds: limit in CPU seconds for the run of one test without a mutant.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._passes: dict[str, bool] = {}

    @property
    def failing(self) -> list[str]:
        """The test functions that fail without a mutant, among those that failed with one."""
        return [test for test, passes in list(self._passes.items()) if not passes]

    def test(self, worker: Worker, mutant: Mutant, tests: list[str], seconds: float) -> Outcome:
        """Do the same as :meth:`Worker.test`, without the tests that are in :attr:`failing`."""
        while True:
            options = [f"--deselect={test}" for test in self.failing]
            outcome = worker.test(mutant, tests, seconds, options)
            if not outcome.test or self._passes_alone(worker, outcome.test):
                return outcome

    def _passes_alone(self, worker: Worker, test: str) -> bool:
        if test not in self._passes:
            self._passes[test] = worker.run([test], self._seconds).text.startswith("survived")
        return self._passes[test]
