"""``python -m tests.mutants``: plant a random sample of mutants and report which ones the tests do not catch."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.equivalent import reason_for_equivalence
from tests.mutants.mutations import Mutant, changes_of, source_files
from tests.mutants.nearest import nearest_tests
from tests.mutants.worker import Worker

_SELF_TEST = "tests/test_errors.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Test a sample of mutants. Return 1 if fewer than ``--at-least`` percent are caught."""
    options = _parse(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    seed = random.randrange(10**6) if options.seed is None else options.seed
    paths = [path for path in source_files() if options.only in path]
    changes = [change for path in paths for change in changes_of(path)]
    random.Random(seed).shuffle(changes)
    mutants = (mutant for change in changes if (mutant := change.mutant()) is not None)
    sample = list(itertools.islice(mutants, options.sample))
    print(f"{len(sample)} of about {len(changes)} mutants in {len(paths)} files, --seed {seed}", flush=True)
    workers: SimpleQueue[Worker] = SimpleQueue()
    outcomes: dict[Mutant, str] = {}
    left: dict[Mutant, list[str]] = {}  # survivors, and the tests that have not run on them

    def test(mutant: Mutant, seconds: float) -> None:
        start = time.monotonic()
        seconds = min(seconds, deadline - start)
        if reason := reason_for_equivalence(mutant):
            outcomes[mutant] = f"equivalent: {reason}"
        elif seconds > 0:
            worker = workers.get()
            outcome, tests = worker.test(mutant, left.pop(mutant, nearest_tests(mutant.path)), seconds)
            workers.put(worker)
            outcomes[mutant] = outcome
            if tests:
                left[mutant] = tests
        outcome = outcomes.setdefault(mutant, "not run")
        took = time.monotonic() - start
        print(f"{len(outcomes):4} {took:4.0f} s  {mutant.path}:{mutant.line}: {outcome}", flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for number in range(options.jobs):
            workers.put(Worker(Path(folder) / str(number)))
        without_mutant = workers.get()
        if not without_mutant.run([_SELF_TEST], 300)[0].startswith("survived all"):
            sys.exit(f"{_SELF_TEST} fails without a mutant; run `make test` first")
        workers.put(without_mutant)
        list(pool.map(test, sample, itertools.repeat(options.seconds)))
        survivors = list(left)  # run more tests on them, in the time that is left
        seconds = (deadline - time.monotonic()) * options.jobs / max(len(survivors), 1)
        list(pool.map(test, survivors, itertools.repeat(seconds)))
    return _report(outcomes, options.at_least, options.json)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    add = parser.add_argument
    add("--sample", type=int, default=200, help="number of mutants (default: %(default)s)")
    add("--seed", type=int, help="seed of the sample (default: a random seed, which is printed)")
    add("--only", default="", metavar="TEXT", help="only source files whose path contains this text")
    add("--jobs", type=int, default=2, help="mutants at a time (default: %(default)s)")
    add("--seconds", type=float, default=40, help="time for the nearest tests of a mutant (default: %(default)s)")
    add("--minutes", type=float, default=30, help="time for all mutants (default: %(default)s)")
    add("--at-least", type=float, default=95, help="percentage to be caught (default: %(default)s)")
    add("--json", type=Path, help="file for the outcomes")
    return parser.parse_args(arguments)


def _report(outcomes: dict[Mutant, str], at_least: float, path: Path | None) -> int:
    counted = {m: outcome for m, outcome in outcomes.items() if not outcome.startswith(("equivalent", "not run"))}
    survivors = {mutant: outcome for mutant, outcome in counted.items() if outcome.startswith("survived")}
    share = 100 * (1 - len(survivors) / max(len(counted), 1))
    for mutant, outcome in survivors.items():
        print(f"\n{outcome}: {mutant}")
    left_out = len(outcomes) - len(counted)
    print(f"\n{share:.1f} % of {len(counted)} mutants caught; {left_out} equivalent or not run; goal: {at_least:g} %")
    if path is not None:
        rows = [{"mutant": str(mutant), "outcome": outcome} for mutant, outcome in outcomes.items()]
        path.write_text(json.dumps(rows, indent=1))
    return int(share < at_least)


if __name__ == "__main__":
    sys.exit(main())
