"""Record which tests execute which statement, with coverage.py."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.mutants.mutations import ROOT, source_files
from tests.mutants.reach import Reach, places, text_hash
from tests.mutants.worker import Worker

# Test files in one process. The import of the packages takes as long as a small test file.
_BATCH = 3
_SECONDS = 1200  # of CPU time for a batch


def record(path: Path, worker: Worker, files: list[str]) -> None:
    """Append a row to ``path`` for each test file that has no row for its present text."""
    path.parent.mkdir(exist_ok=True)
    known = Reach.load(path).hashes
    hashes = {file: text_hash((ROOT / file).read_text()) for file in files}
    new = [file for file in files if known.get(file) != hashes[file]]
    for start in range(0, len(new), _BATCH):
        batch, began = new[start : start + _BATCH], time.monotonic()
        outcome = worker.run(batch, _SECONDS, plugins=(_Recorder(),), options=("--maxfail=0",))
        print(f"{time.monotonic() - began:4.0f} s  {' '.join(batch)}: {outcome.text}", flush=True)
        reached = worker.tree / _OUTPUT
        if not reached.exists():
            continue  # the tests did not end
        rows = json.loads(reached.read_text())
        reached.unlink()
        with path.open("a") as lines:
            for file in batch:
                lines.write(json.dumps({"file": file, "hash": hashes[file], **rows.get(file, _EMPTY)}) + "\n")


_OUTPUT = "reached.json"
_EMPTY: dict[str, Any] = {"seconds": {}, "reached": {}}


class _Recorder:
    """A pytest plugin: writes the CPU seconds of each test, and the statements that it executes."""

    def pytest_configure(self, config: Any) -> None:
        import coverage

        self._tree = Path.cwd()
        self._seconds: dict[str, float] = defaultdict(float)
        folders = ("attnzoo", "adapters", "benchmarks")
        include = [str(self._tree / folder / "*") for folder in folders]
        self._coverage = coverage.Coverage(data_file=None, config_file=False, include=include)
        self._coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._start = time.process_time()
        self._coverage.switch_context(nodeid.partition("[")[0])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._seconds[nodeid.partition("[")[0]] += time.process_time() - self._start

    def pytest_unconfigure(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        rows: dict[str, Any] = {}
        for test, seconds in self._seconds.items():
            row = rows.setdefault(test.partition("::")[0], {"seconds": {}, "reached": {}})
            row["seconds"][test] = round(seconds, 3)
        numbers = {test: number for row in rows.values() for number, test in enumerate(row["seconds"])}
        for source in source_files():
            file = (self._tree / source).resolve()
            known = places(file.read_text())
            for line, tests in data.contexts_by_lineno(str(file)).items():
                place = known.of_line[line]
                for test in tests if place.function else ():
                    if test in numbers:
                        functions = rows[test.partition("::")[0]]["reached"].setdefault(source, {})
                        _, lines = functions.setdefault(place.function, (known.hashes[place.function], {}))
                        lines.setdefault(place.line, []).append(numbers[test])
        (self._tree / _OUTPUT).write_text(json.dumps(rows))
