"""The scopes ``overhead`` and ``decode`` give CPU seconds of a call or token, and how far they exceed the original's.

No test asserts a duration: the clocks and the workers here return fixed values.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from attnzoo.benchmarks import measure, summary
from attnzoo.benchmarks.cases import HOST_SCOPES, Case, build
from attnzoo.benchmarks.contenders import BackendContender, Execution, GateVerdict, Original
from attnzoo.benchmarks.counting import Counting
from attnzoo.benchmarks.decoding import GATE_TOKENS, TIMED_TOKENS, Decoding
from attnzoo.benchmarks.measure import Peak
from attnzoo.benchmarks.options import make_plan
from attnzoo.benchmarks.rows import OK, RED, SKIPPED, Problem
from attnzoo.benchmarks.runner import ShootoutPlan, run
from attnzoo.benchmarks.worker import Worker
from attnzoo.errors import InvalidArgumentError
from tests.benchmarks.conftest import assert_no_measurements, line_of, printed, row_of

scopes = pytest.mark.parametrize("scope", HOST_SCOPES)
TIMES = {"native": (4e-3, 1e-3, 3e-3), "counting": (4.1e-3, 1.2e-3, 3.1e-3), "sdpa": (4.8e-3, 3e-3, 3.4e-3)}


def measured(**complaints):
    """A shootout whose workers answer from the table, with two attention modules per token."""

    class Fixed(Worker):
        def __init__(self, contender, case):
            self.name, self.times = contender.name, iter(TIMES[contender.name])

        def setup(self):
            return Peak(1, 1, "fixed"), 1e-3

        def gate(self):
            return GateVerdict()

        def time(self):
            return next(self.times)

        def execution(self):
            return Execution("kernel", complaints.get(self.name, ""), sites=0 if self.name == "native" else 2)

    plan = ShootoutPlan(families=("tiny",), seq_lens=(40,), modes=(False,), rounds=3, scope="decode")
    contenders = (Original(), Counting(), BackendContender("sdpa"))
    return run(plan, launch=Fixed, check=lambda job: (True, ""), contenders=contenders)


def test_overhead_is_the_median_difference_of_a_round_per_module():
    result = measured()
    assert [row.overhead for row in result.rows] == [None, pytest.approx(5e-5), pytest.approx(4e-4)]
    assert [row.sites for row in result.rows] == [0, 2, 2]
    text = printed(result)
    assert line_of(text, "sdpa")[2:4] == ["3.40", "ms"] and "400 us" in text and "counting is the original" in text


def test_a_row_with_a_problem_has_no_overhead():
    result = measured(sdpa="another kernel ran", native="another kernel ran")
    _, counting, sdpa = result.rows
    assert (sdpa.status, sdpa.sites, sdpa.overhead) == (RED, None, None)
    assert_no_measurements(sdpa)
    assert (counting.status, counting.overhead) == (OK, None), "there is no original to compare with"


@pytest.mark.parametrize(("scope", "sites"), [("decode", 4), ("overhead", 1)])
def test_a_tiny_model_is_measured_in_every_way(shootout, scope, sites):
    """The decoder of the tiny family has two layers with self-attention and cross-attention."""
    result = shootout("sdpa", "wrong", scope=scope)
    original, counting, sdpa = (row_of(result, name) for name in ("native", "counting", "sdpa"))
    assert all(row.status == OK and row.seconds for row in (original, counting, sdpa))
    assert (counting.kernel, counting.sites, sdpa.sites) == ("original", sites, sites)
    assert counting.overhead is not None and sdpa.overhead is not None
    assert row_of(result, "wrong").status == RED, "wrong numbers get no time"


def test_other_scopes_have_no_counting_row_and_no_overhead(shootout):
    result = shootout("sdpa", scope="module")
    assert [row.backend for row in result.rows] == ["native", "sdpa"]
    assert all(row.sites is row.overhead is None for row in result.rows) and "overhead" not in printed(result)


def test_a_patch_that_runs_other_code_is_no_counting():
    prepared = Counting().prepare(Case("tiny", "overhead", 40, 1, "float32", "cpu", 1, False))
    assert prepared.execution() == Execution("original", "", 1)
    for site in prepared._handle.sites:
        site.kernels = _Renamed(site.kernels)
    assert "flash ran" in prepared.execution().complaint


class _Renamed(Counter):
    """A counter that counts every kernel as flash."""

    def __missing__(self, key):
        return 0

    def __setitem__(self, key, value):
        super().__setitem__("flash", value)


def test_decoded_tokens_are_those_of_a_plain_generation():
    case = Case("tiny", "decode", 40, 2, "float32", "cpu", 1, False)
    subject = build(case)
    with torch.no_grad():
        given = {name: value for name, value in subject.call.func.__self__._prompt.items()}
        expected = subject.model.generate(**given, min_new_tokens=GATE_TOKENS, max_new_tokens=GATE_TOKENS)
        assert torch.equal(subject.call(), expected)
    assert expected.shape == (2, GATE_TOKENS + 1) and subject.tokens == GATE_TOKENS


def test_the_first_token_is_not_timed(monkeypatch):
    """It includes the prompt. Here it takes 10 seconds, each further token 2, and one token 50."""
    clock = iter([10.0, *(12.0 + 2 * step + 48 * (step > 4) for step in range(TIMED_TOKENS))])
    monkeypatch.setattr("attnzoo.benchmarks.decoding.time.process_time", lambda: next(clock))
    subject = build(Case("tiny", "decode", 40, 1, "float32", "cpu", 1, False))
    assert subject.seconds() == 2.0


def test_a_model_without_text_is_skipped():
    with pytest.raises(Problem, match="generates no text") as caught:
        Decoding(torch.nn.Linear(2, 2), {})
    assert caught.value.status == SKIPPED


@pytest.mark.parametrize(("seconds", "runs"), [(0.001, 51), (0.2, 2), (1e-6, 201)])
def test_short_calls_run_several_times(monkeypatch, seconds, runs):
    now, ran = [0.0], []

    def call():
        ran.append(1)
        now[0] += seconds

    monkeypatch.setattr(measure.time, "process_time", lambda: now[0])
    assert measure.cpu_seconds(call) == pytest.approx(seconds)
    assert abs(len(ran) - runs) <= 1


@scopes
def test_host_scopes_time_the_forward_only(scope):
    assert make_plan(["tiny"], scope=scope, threads=1).modes == (False,)
    with pytest.raises(InvalidArgumentError, match=f"--train with scope '{scope}'"):
        make_plan(["tiny"], scope=scope, train=True, threads=1)


def test_layers_belong_to_whole_models():
    assert make_plan(["tiny"], scope="decode", layers=1, threads=1).layers == 1
    with pytest.raises(InvalidArgumentError, match="layers"):
        make_plan(["tiny"], scope="overhead", layers=1, threads=1)


@pytest.mark.parametrize("scope", ["model", "module", "attention"])
def test_clock_cpu_does_not_count_the_time_of_other_programs(scope, shootout, monkeypatch):
    monkeypatch.setitem(measure.CLOCKS, "cpu", itertools.count(step=5.0).__next__)
    result = shootout("sdpa", scope=scope, clock="cpu", peers=False)
    # The scope attention subtracts the projections, which the same clock times.
    assert {row.seconds for row in result.rows} == {0.0 if scope == "attention" else 5.0}
    assert {row.note for row in result.rows} == {"times are CPU time"}
    assert " --clock cpu " in summary.command(result)


def test_clock_is_wall_unless_asked_for(plain):
    assert plain.plan["clock"] == "wall" and " --clock" not in summary.command(plain)
    with pytest.raises(InvalidArgumentError, match="clock: got 'sun'"):
        make_plan(["tiny"], clock="sun", threads=1)


def test_cpu_time_of_a_gpu_run_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InvalidArgumentError, match="clock: got 'cpu' with device 'cuda'; allowed: 'wall'"):
        make_plan(["tiny"], clock="cpu", device="cuda", threads=1)
