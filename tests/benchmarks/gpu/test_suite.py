"""The item ``tests`` reads what pytest prints, so that a run out of time still shows its failures."""

from __future__ import annotations

import pytest

from attnzoo.benchmarks.gpu import suite as module
from attnzoo.benchmarks.gpu.results import Verdict
from attnzoo.benchmarks.gpu.settings import Settings
from attnzoo.benchmarks.gpu.suite import Outcomes, suite

PLAIN = """\
tests/a.py::test_a[cuda x-1] PASSED                                    [ 33%]
tests/a.py::test_b FAILED                                              [ 66%]
tests/a.py::test_c SKIPPED (needs a CUDA device)                       [100%]
=== short test summary info ===
FAILED tests/a.py::test_b - AssertionError: wrong
"""
PARALLEL = """\
tests/a.py::test_a[cuda x-1]
[gw0] [ 33%] PASSED tests/a.py::test_a[cuda x-1]
[gw1] [ 66%] FAILED tests/a.py::test_b
[gw0] [100%] SKIPPED tests/a.py::test_c
FAILED tests/a.py::test_b - AssertionError: wrong
"""


@pytest.mark.parametrize("text", [PLAIN, PARALLEL], ids=["plain", "parallel"])
def test_outcomes_are_read_from_the_lines(text):
    kept = []
    outcomes = Outcomes(kept.append)
    for line in text.splitlines():
        outcomes.read(line)
    running = kept[1].verdicts
    assert running[0] == Verdict("tests/a.py::test_b", "failed", "log.txt has the reason")
    assert running[1].detail == "running: 1 failed, 1 passed", "kept before the end"
    outcomes.finish(1)
    assert kept[-1].verdicts == (
        Verdict("tests/a.py::test_b", "failed", "AssertionError: wrong"),
        Verdict("tests with the mark cuda", "ok", "ended: 1 failed, 1 passed, 1 skipped"),
    )


@pytest.mark.parametrize(("code", "status"), [(0, "ok"), (5, "ok"), (2, "failed"), (-9, "failed")])
def test_exit_code_of_pytest_counts(code, status):
    kept = []
    Outcomes(kept.append).finish(code)
    assert kept[0].verdicts[0].status == status and "no test ran" in kept[0].verdicts[0].detail


def test_missing_package_is_named(monkeypatch):
    kept = []
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "hypothesis" else "there")
    suite(Settings("cpu", tiny=True), kept.append)
    assert kept[0].verdicts == (Verdict("tests", "skipped", "needs hypothesis"),)
