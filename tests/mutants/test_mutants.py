"""The mutation tests plant real faults, run the nearest tests first, and report what the tests do not catch."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("mutmut", reason="the mutation tests need mutmut, which is in the extra 'dev'")

from tests.mutants import __main__ as command
from tests.mutants import mutations
from tests.mutants.equivalent import EQUIVALENT, reason_for_equivalence
from tests.mutants.mutations import ROOT, Mutant, changes_of, source_files
from tests.mutants.nearest import nearest_tests
from tests.mutants.worker import Outcome, Worker

SOURCE = '''
"""A docstring with words: True."""


@functools.lru_cache(maxsize=3)
def scores(query, key: "Tensor | None" = None):
    """Return 1 + 1."""
    if key is None:
        raise InvalidArgumentError("key", None, "1 tensor")
    strict: bool = False
    return query + key * 2, "long text", "name", fill(query, value=0), zip(query, key, strict=strict)
'''


@pytest.fixture
def mutants(tmp_path, monkeypatch):
    """The mutants of a small file, as pairs of changed lines."""
    (tmp_path / "scores.py").write_text(SOURCE)
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    found = [change.mutant() for change in changes_of("scores.py")]
    return {(mutant.before, mutant.after) for mutant in found if mutant is not None}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if key is None:", "if key is not None:"),
        ("query + key", "query - key"),
        ("key * 2", "key / 2"),
        ("key * 2", "key * 3"),
        ('"name"', '"NAME"'),
        ("fill(query, value=0)", "fill(query, value=None)"),
        ("fill(query, value=0)", "fill(query, )"),
        ("fill(query, value=0)", "fill(value=0)"),
    ],
)
def test_operators_change_conditions_arithmetic_names_and_arguments(mutants, before, after):
    assert any(new == old.replace(before, after) != old for old, new in mutants)


@pytest.mark.parametrize("text", ["docstring", "Return 1", "lru_cache", "Tensor", "raise", "long text"])
def test_texts_decorators_annotations_and_messages_do_not_change(mutants, text):
    assert not any(text in old and old.count(text) != new.count(text) for old, new in mutants)


def test_guards_and_none_for_false_are_no_mutants(mutants):
    assert ("strict: bool = False", "strict: bool = True") in mutants
    assert not any("bool = None" in new or "strict=None" in new for _, new in mutants)


def test_every_mutant_differs_from_the_source_in_meaning(mutants):
    assert len(mutants) >= 8 and all(old != new for old, new in mutants)


def test_scope_holds_the_core_the_judges_the_backends_and_the_adapters():
    files = source_files()
    for path in ("adapters/led.py", "attnzoo/spec/patterns.py", "attnzoo/conformance/error_rule.py"):
        assert path in files
    assert "attnzoo/backends/common/union.py" in files and "benchmarks/contenders.py" in files
    assert not any("report_text" in path or "/cli/" in path for path in files)


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("attnzoo/spec/patterns.py", "tests/spec/test_patterns.py"),
        ("attnzoo/registry.py", "tests/test_registry.py"),
        ("attnzoo/backends/common/union.py", "tests/backends/test_union.py"),
        ("attnzoo/conformance/error_rule.py", "tests/conformance/test_error_rule.py"),
    ],
)
def test_first_test_of_a_source_file_has_its_name(source, test):
    tests = nearest_tests(source)
    assert tests[0] == test and len(tests) == len(set(tests)) > 80


FAILING = """
import pytest

@pytest.mark.parametrize("number", [0, 1])
def test_number(number):
    print("FAILED tests/nested.py::test_other - as a nested run of pytest prints it")
    assert not number
"""


def _worker_outcomes(folder: Path) -> dict[str, Outcome]:
    """Run a worker on a right tree, a broken one, a restored one, and on a test that does not end."""
    worker = Worker(folder)
    code = (ROOT / "attnzoo/errors.py").read_text()
    mutant = Mutant("attnzoo/errors.py", 1, "", "", code.replace("class InvalidArgumentError(", "class Invalid("))
    tests, endless = ["tests/test_errors.py"], ["tests/test_endless.py"]
    (worker.tree / endless[0]).write_text("def test_endless():\n    while True: pass\n")
    (worker.tree / "tests/test_failing.py").write_text(FAILING)
    return {
        "right": worker.run(tests, 120),
        "broken": worker.test(mutant, tests, 120),
        "restored": worker.run(tests, 120),
        "out of time": worker.run(endless, 2),
        "failing": worker.run(["tests/test_failing.py"], 120),
        "deselected": worker.run(["tests/test_failing.py"], 120, options=["--deselect=tests/test_failing.py"]),
        "endless": worker.run(endless, 120, test_seconds=1),
    }


@pytest.mark.slow
def test_worker_says_whether_the_tests_catch_a_mutant(tmp_path):
    code = (ROOT / "attnzoo/errors.py").read_text()
    # In a fresh process: a process has only one fork server, and a test of the shootout may have started it here.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        outcomes = fresh.submit(_worker_outcomes, tmp_path / "tree").result()
    assert outcomes["right"].text == "survived all tests" and 0.0 < outcomes["right"].seconds < 120
    assert outcomes["broken"].text.startswith("caught by")
    assert outcomes["deselected"].text == "survived all tests", "no test has failed"
    assert outcomes["failing"].test == "tests/test_failing.py::test_number"
    assert outcomes["failing"].text == "caught by test_failing.py::test_number[1]"
    assert outcomes["restored"].text == "survived all tests", "the worker must restore the source"
    assert (ROOT / "attnzoo/errors.py").read_text() == code
    assert outcomes["out of time"] == Outcome("survived 2 s of tests", 2), "tests that did not end have caught nothing"
    assert outcomes["endless"].text == "caught by a test that did not end"


class FakeWorker:
    """A worker with prepared outcomes, which records the tests that it runs."""

    outcomes: ClassVar[list[tuple]] = []
    ran: ClassVar[list[tuple[list[str], float]]] = []
    failing: ClassVar[list[str]] = []
    deselected: ClassVar[list[list[str]]] = []

    def __init__(self, folder):
        pass

    def run(self, tests, seconds):
        return Outcome("caught by it" if tests[0] in self.failing else "survived all tests", 1.0)

    def test(self, mutant, tests, seconds, options):
        self.ran.append((tests, seconds))
        self.deselected.append(options)
        return Outcome(*self.outcomes.pop(0))


class FakeSchedule:
    """A schedule with two batches of tests."""

    executed: ClassVar[bool] = True

    def __init__(self, reach):
        pass

    def batches(self, mutant):
        return [["a.py"], ["b.py"]]

    def executes(self, mutant):
        return self.executed


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs the command with the outcomes of a fake worker, and returns exit code and output."""
    monkeypatch.setattr(command, "Worker", FakeWorker)
    monkeypatch.setattr(command, "Schedule", FakeSchedule)
    for kept in (FakeWorker.ran, FakeWorker.failing, FakeWorker.deselected):
        kept.clear()

    def run(outcomes, *options):
        FakeWorker.outcomes[:] = outcomes
        sample = ["--sample", "4", "--seed", "0", "--only", "attnzoo/functional.py", "--jobs", "1"]
        return command.main([*sample, *options]), capsys.readouterr().out

    return run


CAUGHT, SURVIVED = ("caught by a", 5), ("survived all tests", 5)
OUTCOMES = [CAUGHT, SURVIVED, SURVIVED, CAUGHT, SURVIVED, ("caught by b", 5)]  # one mutant survives both batches


def test_command_fails_below_the_goal_and_lists_the_survivors(run):
    code, output = run(OUTCOMES, "--at-least", "80")
    assert code == 1
    assert "75.0 % of 4 mutants caught" in output and "--seed 0" in output
    assert output.count("\nsurvived all tests: attnzoo/functional.py:") == 1


def test_command_reaches_the_goal_and_writes_json(run, tmp_path):
    code, _ = run(OUTCOMES, "--at-least", "75", "--json", str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert code == 0
    assert [row["outcome"] for row in rows] == ["caught by a", "survived all tests", "caught by a", "caught by b"]


def test_mutant_runs_batches_until_a_test_fails(run):
    _, output = run(OUTCOMES, "--seconds", "12")
    assert [tests for tests, _ in FakeWorker.ran] == [["a.py"], ["a.py"], ["b.py"], ["a.py"], ["a.py"], ["b.py"]]
    assert [seconds for _, seconds in FakeWorker.ran] == [12, 12, 7, 12, 12, 7]
    assert "75.0 % of 4 mutants caught" in output


def test_a_test_that_fails_without_a_mutant_catches_nothing(run):
    FakeWorker.failing.append("a.py::test_broken")
    false, true = ("caught by a", 5, "a.py::test_broken"), ("caught by a", 5, "a.py::test_right")
    _, output = run([false, SURVIVED, SURVIVED, true, true, CAUGHT])
    assert "75.0 % of 4 mutants caught" in output
    assert FakeWorker.deselected == [[], *[["--deselect=a.py::test_broken"]] * 5]
    assert output.count("without a mutant: a.py::test_broken") == 1


def test_mutant_has_a_limit_in_cpu_seconds(run):
    _, output = run([CAUGHT, ("survived 12 s of tests", 12), CAUGHT, CAUGHT], "--seconds", "12")
    assert len(FakeWorker.ran) == 4 and "\nsurvived 12 s of tests: attnzoo/functional.py:" in output


def test_equivalent_mutants_do_not_count(run, monkeypatch):
    monkeypatch.setattr(command, "reason_for_equivalence", lambda mutant: "no row changes")
    _, output = run([])
    assert "of 0 mutants caught" in output and "4 equivalent" in output


def test_mutants_that_no_test_executes_are_listed_and_not_counted(run, monkeypatch):
    monkeypatch.setattr(FakeSchedule, "executed", False)
    code, output = run(OUTCOMES, "--at-least", "100")
    assert code == 0 and "100.0 % of 3 mutants caught" in output and "1 not executed here" in output
    assert output.count("\nnot executed here: attnzoo/functional.py:") == 1


@pytest.mark.parametrize("key", EQUIVALENT, ids=lambda key: key[0])
def test_equivalent_mutants_change_lines_of_the_present_source(key):
    path, before, after = key
    assert " ".join(before.split()) in " ".join((ROOT / path).read_text().split()) and before != after
    assert reason_for_equivalence(Mutant(path, 1, before, after, "")) == EQUIVALENT[key]
    assert len(EQUIVALENT[key]) > 20
    assert reason_for_equivalence(Mutant(path, 1, before, f"{after} ", "")) is None


@pytest.mark.parametrize(
    ("after", "is_equivalent"),
    [
        ('real = once(mask, "XXrealXX", _real)', True),
        ('real = once(mask, "REAL", _real)', True),
        ("real = once(mask, None, _real)", True),
        ('real = once(None, "real", _real)', False),
        ('real = once(mask, "real", None)', False),
        ("real = once(mask, _real)", False),
        ("real = None", False),
    ],
)
def test_mutants_that_only_rename_a_cached_value_are_equivalent(after, is_equivalent):
    mutant = Mutant("adapters/new.py", 1, 'real = once(mask, "real", _real)', after, "")
    assert (reason_for_equivalence(mutant) is not None) == is_equivalent


@pytest.mark.parametrize(
    ("path", "after", "is_equivalent"),
    [
        ("attnzoo/auto/rule.py", "Limit(512, 3_000_001),", True),
        ("attnzoo/auto/rule.py", "Limit(513, 3_000_000),", True),
        ("attnzoo/auto/rule.py", "Limit(512, None),", False),
        ("attnzoo/auto/other.py", "Limit(512, 3_000_001),", False),
    ],
)
def test_mutants_that_move_a_measured_limit_are_equivalent(path, after, is_equivalent):
    key = '("window", "cpu", FORWARD): '
    mutant = Mutant(path, 1, f"{key}Limit(512, 3_000_000),", f"{key}{after}", "")
    assert (reason_for_equivalence(mutant) is not None) == is_equivalent
