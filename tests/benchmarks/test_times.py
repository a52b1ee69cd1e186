"""Each row has the times, memory and ratios of its contender. The workers of these tests return fixed values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attnzoo.benchmarks.contenders import BackendContender, Execution, GateVerdict, Original
from attnzoo.benchmarks.measure import Peak
from attnzoo.benchmarks.rows import FAILED, OK, RED, REFUSED, EndToEnd, Problem, Shootout
from attnzoo.benchmarks.runner import ShootoutPlan, run
from attnzoo.benchmarks.worker import Worker
from tests.benchmarks.conftest import assert_no_measurements

TIMES = {"native": (4.0, 1.0, 3.0), "eager": (2.0, 8.0, 6.0), "sdpa": (1.0, 1.5, 10.0)}
PEAKS = {"native": 100, "eager": 400, "sdpa": 25}
CONTENDERS = (Original(), BackendContender("eager"), BackendContender("sdpa"))


def measured(
    gates: dict[str, str] | None = None, complaints: dict[str, str] | None = None, fails_in: str = "", **fields: Any
) -> tuple[Shootout, list[str]]:
    """Return the results of a shootout whose workers answer from the tables above, and the order of the timed runs.

    ``gates`` and ``complaints`` are complaints of the gate and of the execution. ``fails_in`` names a contender whose
    second timed run raises.
    """
    order: list[str] = []

    class Fixed(Worker):
        def __init__(self, contender, case):
            self.name, self.number = contender.name, 0

        def setup(self):
            return Peak(PEAKS[self.name], 7, "fixed"), 1.0

        def gate(self):
            return GateVerdict((gates or {}).get(self.name, ""), checks=2)

        def time(self):
            order.append(self.name)
            self.number += 1
            if self.name == fails_in and self.number == 2:
                raise RuntimeError("lost")
            return TIMES[self.name][(self.number - 1) % 3]

        def execution(self):
            return Execution(f"kernel of {self.name}", (complaints or {}).get(self.name, ""))

    check = fields.pop("check", lambda job: (True, ""))
    fields = {"families": ("tiny",), "seq_lens": (40,), "modes": (False,), "rounds": 3, **fields}
    result = run(ShootoutPlan(**fields), launch=Fixed, check=check, contenders=CONTENDERS)
    return result, order


def test_times_and_memory_belong_to_their_contender():
    result, order = measured()
    rows = {row.backend: row for row in result.rows}
    assert {name: row.runs for name, row in rows.items()} == TIMES
    assert {name: row.seconds for name, row in rows.items()} == {"native": 3.0, "eager": 6.0, "sdpa": 1.5}
    assert {name: (row.fastest, row.slowest) for name, row in rows.items()} == {
        "native": (1.0, 4.0), "eager": (2.0, 8.0), "sdpa": (1.0, 10.0),
    }  # fmt: skip
    assert {name: row.speedup for name, row in rows.items()} == {"native": 1.0, "eager": 0.5, "sdpa": 2.0}
    assert {name: row.peak_bytes for name, row in rows.items()} == PEAKS
    assert {name: row.peak_ratio for name, row in rows.items()} == {"native": 1.0, "eager": 4.0, "sdpa": 0.25}
    assert {name: row.kernel for name, row in rows.items()} == {name: f"kernel of {name}" for name in TIMES}
    assert order == ["native", "eager", "sdpa", "eager", "sdpa", "native", "sdpa", "native", "eager"]


@pytest.mark.parametrize("budget, rounds", [(1.0, 3), (15.0, 5), (100.0, 9)])
def test_number_of_rounds_fits_the_time_budget(budget, rounds):
    """The first runs of three contenders take one second each."""
    result, _ = measured(rounds=None, seconds_per_case=budget)
    assert {len(row.runs) for row in result.rows} == {rounds}


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        (dict(gates={"eager": "wrong numbers"}), RED, "wrong numbers"),
        (dict(complaints={"eager": "another kernel ran"}), RED, "another kernel ran"),
        (dict(fails_in="eager"), FAILED, "RuntimeError: lost"),
    ],
)
def test_row_with_a_problem_has_no_numbers_and_the_others_keep_theirs(changes, status, reason):
    result, order = measured(**changes)
    original, bad, good = result.rows
    assert (bad.backend, bad.status) == ("eager", status) and reason in bad.reason and not result.ok
    assert_no_measurements(bad)
    assert (original.status, original.runs) == (OK, TIMES["native"])
    assert (good.status, good.runs, good.speedup) == (OK, TIMES["sdpa"], 2.0)
    if "gates" in changes:
        assert "eager" not in order, "a contender that fails the gate is not timed"


def test_rows_have_no_ratio_to_an_original_with_a_problem():
    result, _ = measured(fails_in="native")
    original, *others = result.rows
    assert original.status == FAILED and not result.ok
    assert all(row.status == OK and row.seconds and row.speedup is row.peak_ratio is None for row in others)


def raises(error: Exception) -> Callable[[Any], Any]:
    def check(job: Any) -> Any:
        raise error

    return check


@pytest.mark.parametrize(
    ("check", "status", "reason"),
    [
        (lambda job: (False, "logits: FAILS"), RED, "logits: FAILS"),
        (raises(RuntimeError("no memory")), FAILED, "RuntimeError: no memory"),
        (raises(Problem(REFUSED, "dtype: got float32")), REFUSED, "dtype: got float32"),
    ],
)
def test_end_to_end_verdict_excludes_every_row_of_the_backend(check, status, reason):
    result, _ = measured(check=lambda job: check(job) if job.backend == "eager" else (True, ""))
    original, bad, good = result.rows
    assert (bad.status, original.status, good.status) == (status, OK, OK) and reason in bad.reason
    assert_no_measurements(bad)


@pytest.mark.parametrize(
    ("status", "gradients", "blocks_forward", "blocks_training"),
    [
        (OK, True, False, False),
        (RED, True, True, True),
        (RED, False, True, True),
        (FAILED, True, True, True),
        (REFUSED, True, False, True),
        (REFUSED, False, True, False),
    ],
)
def test_verdict_blocks_modes(status, gradients, blocks_forward, blocks_training):
    verdict = EndToEnd("tiny", "eager", 16, status, "", gradients)
    assert (verdict.blocks(train=False), verdict.blocks(train=True)) == (blocks_forward, blocks_training)
