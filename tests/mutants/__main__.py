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

from tests.mutants.baseline import Baseline
from tests.mutants.equivalent import reason_for_equivalence
from tests.mutants.mutations import ROOT, Mutant, changes_of, source_files
from tests.mutants.nearest import test_files
from tests.mutants.reach import Reach
from tests.mutants.record import record
from tests.mutants.schedule import Schedule
from tests.mutants.worker import Worker

_SELF_TEST = "tests/test_errors.py"
RECORD = ROOT / ".mutants" / "reach.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Test a sample of mutants. Return 1 if fewer than ``--at-least`` percent are caught."""
    options = _parse(arguments)
    if options.record:
        with tempfile.TemporaryDirectory() as folder:
            record(RECORD, Worker(Path(folder) / "tree"), list(test_files()))
        return 0
    seed = random.randrange(10**6) if options.seed is None else options.seed
    paths = [path for path in source_files() if options.only in path]
    changes = [change for path in paths for change in changes_of(path)]
    random.Random(seed).shuffle(changes)
    mutants = (mutant for change in changes if (mutant := change.mutant()) is not None)
    sample = list(itertools.islice(mutants, options.sample))
    schedule, baseline = Schedule(Reach.load(RECORD)), Baseline(options.seconds)
    workers: SimpleQueue[Worker] = SimpleQueue()
    outcomes: dict[Mutant, str] = {}

    def test(mutant: Mutant) -> None:
        start = time.monotonic()
        worker = workers.get()
        outcomes[mutant] = outcome = _outcome(mutant, schedule, worker, baseline, options.seconds)
        workers.put(worker)
        took = time.monotonic() - start
        print(f"{len(outcomes):4} {took:4.0f} s  {mutant.path}:{mutant.line}: {outcome}", flush=True)
        if options.json is not None:
            with options.json.open("a") as rows:
                rows.write(json.dumps({"mutant": str(mutant), "outcome": outcome}) + "\n")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for number in range(options.jobs):
            workers.put(Worker(Path(folder) / str(number)))
        print(f"{len(sample)} of about {len(changes)} mutants in {len(paths)} files, --seed {seed}", flush=True)
        without_mutant = workers.get()
        if not without_mutant.run([_SELF_TEST], 300).text.startswith("survived all"):
            sys.exit(f"{_SELF_TEST} fails without a mutant; run `make test` first")
        workers.put(without_mutant)
        list(pool.map(test, sample))
    for broken in baseline.failing:
        print(f"\nleft out, because it fails in the copy of the working tree without a mutant: {broken}")
    return _report(outcomes, options.at_least)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    add = parser.add_argument
    add("--record", action="store_true", help="only record which tests execute which statement, for a faster run later")
    add("--sample", type=int, default=200, help="number of mutants (default: %(default)s)")
    add("--seed", type=int, help="seed of the sample (default: a random seed, which is printed)")
    add("--only", default="", metavar="TEXT", help="only source files whose path contains this text")
    add("--jobs", type=int, default=2, help="mutants at a time (default: %(default)s)")
    add("--seconds", type=float, default=120, help="CPU seconds for the tests of a mutant (default: %(default)s)")
    add("--at-least", type=float, default=95, help="percentage to be caught (default: %(default)s)")
    add("--json", type=Path, help="file to append the outcomes to, one a line")
    return parser.parse_args(arguments)


def _outcome(mutant: Mutant, schedule: Schedule, worker: Worker, baseline: Baseline, seconds: float) -> str:
    """Run batches of tests on a mutant, until a test fails or the time is over."""
    if reason := reason_for_equivalence(mutant):
        return f"equivalent: {reason}"
    left = seconds
    for tests in schedule.batches(mutant):
        outcome = baseline.test(worker, mutant, tests, left)
        left -= outcome.seconds
        if outcome.text.startswith("caught"):
            return outcome.text
        if left < 1:
            break
    if not schedule.executes(mutant):
        return "not executed here"
    return f"survived {seconds:.0f} s of tests" if left < 1 else "survived all tests"


def _report(outcomes: dict[Mutant, str], at_least: float) -> int:
    groups: dict[str, dict[Mutant, str]] = {}
    for mutant, outcome in outcomes.items():
        groups.setdefault(outcome.partition(" ")[0].rstrip(":"), {})[mutant] = outcome
    for name in ("not", "survived"):
        for mutant, outcome in groups.get(name, {}).items():
            print(f"\n{outcome}: {mutant}")
    count = {name: len(groups.get(name, ())) for name in ("caught", "survived", "equivalent", "not")}
    counted = count["caught"] + count["survived"]
    share = 100 * count["caught"] / max(counted, 1)
    print(f"\n{share:.1f} % of {counted} mutants caught; goal: {at_least:g} %")
    print(f"not counted: {count['equivalent']} equivalent, {count['not']} not executed here")
    return int(share < at_least)


if __name__ == "__main__":
    sys.exit(main())
