"""Run the tests that need the device, and keep a verdict on each test that failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import attnzoo
from attnzoo.benchmarks.gpu.results import Keep, Results, Verdict
from attnzoo.benchmarks.gpu.settings import Settings
from attnzoo.benchmarks.rows import FAILED, OK, SKIPPED

PROCESSES = 8
_OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# Lines of pytest -v: with processes, without, and in the summary at the end.
_LINES = (
    re.compile(rf"\[gw\d+\] \[ *\d+%\] (?P<outcome>{_OUTCOMES}) (?P<test>tests/.+?)(?P<reason>)"),
    re.compile(rf"(?P<test>tests/.+) (?P<outcome>{_OUTCOMES})(?: \(.*\))?(?: +\[ *\d+%\])?(?P<reason>)"),
    re.compile(r"(?P<outcome>FAILED|ERROR) (?P<test>tests/.+?)(?: - (?P<reason>.*))?"),
)


def suite(settings: Settings, keep: Keep, folder: str = "tests") -> None:
    """Run all tests with the mark ``cuda``. Without a GPU, only collect them.

    Verdicts are kept as the tests end, so a run that is out of time still shows its failures.
    """
    root = Path(attnzoo.__path__[0]).parent
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing or not (root / folder).is_dir():
        detail = f"needs {' and '.join(missing)}" if missing else f"{root} has no folder {folder}"
        keep(Results(verdicts=(Verdict("tests", SKIPPED, detail),)))
        return
    parallel = ["-n", str(PROCESSES)] if find_spec("xdist") is not None and settings.device == "cuda" else []
    collect = [] if settings.device == "cuda" else ["--collect-only"]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-v", "--color=no", "-p", "no:cacheprovider", folder]
    # These tests need the documentation or the development tools, and no device.
    command += ["--ignore=tests/docs", "--ignore=tests/mutants", "--ignore=tests/examples"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATTNZOO_HYPOTHESIS_PROFILE": "cuda", "COLUMNS": "200"}
    outcomes = Outcomes(keep)
    with subprocess.Popen(
        [*command, *parallel, *collect], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            outcomes.read(line.strip())
    outcomes.finish(process.returncode)


class Outcomes:
    """The outcomes of tests, from the lines that ``pytest -v`` prints."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._outcome: dict[str, str] = {}
        self._reason: dict[str, str] = {}

    def read(self, line: str) -> None:
        """Keep a verdict if the line has the outcome of a test."""
        match = next((match for pattern in _LINES if (match := pattern.fullmatch(line))), None)
        if match:
            test = match["test"]
            self._outcome[test] = match["outcome"]
            self._reason[test] = match["reason"] or self._reason.get(test, "")
            self._write(OK, "running")

    def finish(self, code: int) -> None:
        """Keep the last verdict. pytest ends with 1 after failures, and with 5 if there is no test to run."""
        ended = code in (0, 1, 5)
        self._write(OK if ended else FAILED, "ended" if ended else f"ended with exit code {code}")

    def _write(self, status: str, state: str) -> None:
        counts = Counter(self._outcome.values())
        text = ", ".join(f"{count} {outcome.lower()}" for outcome, count in sorted(counts.items()))
        wrong = [test for test, outcome in self._outcome.items() if outcome in ("FAILED", "ERROR", "XPASS")]
        verdicts = [Verdict(test, FAILED, self._reason[test] or "log.txt has the reason") for test in wrong]
        summary = Verdict("tests with the mark cuda", status, f"{state}: {text or 'no test ran'}")
        self._keep(Results(verdicts=(*verdicts, summary)))
