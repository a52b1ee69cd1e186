"""The record of the statements that each test executes gives the tests of a mutant, cheapest first."""

import itertools
import json
import textwrap

import pytest

pytest.importorskip("mutmut", reason="the mutation tests need mutmut, which is in the extra 'dev'")

from tests.mutants import schedule
from tests.mutants.mutations import ROOT, Mutant
from tests.mutants.nearest import nearest_tests
from tests.mutants.reach import Place, Reach, places, text_hash
from tests.mutants.schedule import Schedule

SOURCE = textwrap.dedent(
    '''\
    LIMIT = 3


    class Pattern:
        size = 1

        @property
        def area(self):
            """The area."""
            if self.size:
                return (
                    self.size
                    * 2
                )
            return 0


    def scale(x):
        return x * LIMIT
    '''
)
KNOWN = places(SOURCE)
TESTS = ["tests/test_a.py::test_slow", "tests/test_a.py::test_fast", "tests/test_a.py::test_other"]


def line_of(text):
    return next(number for number, line in enumerate(SOURCE.splitlines(), 1) if text in line)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("LIMIT = 3", Place("", 1)),
        ("size = 1", Place("", 5)),
        ("@property", Place("", 7)),
        ("if self.size", Place("Pattern.area", 2)),
        ("* 2", Place("Pattern.area", 3)),
        ("return 0", Place("Pattern.area", 7)),
        ("return x", Place("scale", 1)),
    ],
)
def test_each_line_has_its_innermost_statement(text, place):
    assert KNOWN.of_line[line_of(text)] == place


@pytest.fixture
def reach(tmp_path):
    """The record of three tests: two compute an area, one of them an area of 0, and one scales."""
    area = [KNOWN.hashes["Pattern.area"], {"2": [0, 1], "3": [0, 1], "7": [0]}]
    reached = {"a.py": {"Pattern.area": area, "scale": [KNOWN.hashes["scale"], {"1": [2]}]}}
    seconds = dict(zip(TESTS, (9.0, 0.1, 0.2), strict=True))
    row = {"file": "tests/test_a.py", "hash": "new", "seconds": seconds, "reached": reached}
    old = {"file": "tests/test_a.py", "hash": "old", "seconds": {"tests/test_a.py::test_old": 1.0}, "reached": {}}
    (tmp_path / "record").write_text(f"{json.dumps(old)}\n{json.dumps(row)}\n")
    return Reach.load(tmp_path / "record")


def test_last_row_of_a_test_file_counts(reach):
    assert reach.hashes == {"tests/test_a.py": "new"} and set(reach.seconds) == set(TESTS)


@pytest.mark.parametrize(
    ("text", "tests"),
    [("* 2", [1, 0]), ("return 0", [0]), ("return x", [2]), ("LIMIT = 3", [1, 2, 0])],
)
def test_tests_that_execute_a_line_come_cheapest_first(reach, text, tests):
    assert reach.tests_of("a.py", line_of(text), KNOWN) == [TESTS[number] for number in tests]


def test_a_changed_function_has_the_tests_of_its_name(reach):
    changed = places(SOURCE.replace("return 0", "return 1"))
    assert reach.tests_of("a.py", line_of("return 0"), changed) == [TESTS[1], TESTS[0]]
    assert reach.executes("a.py", line_of("return 0"), changed), "nobody knows what the new text executes"


def test_statements_that_no_test_executes_are_known(reach):
    longer = SOURCE + "\n\ndef new(x):\n    return x\n"
    assert not reach.executes("a.py", len(longer.splitlines()), places(longer))
    assert reach.executes("a.py", line_of("return x"), KNOWN) and reach.executes("a.py", line_of("LIMIT = 3"), KNOWN)


def test_without_a_record_the_nearest_test_files_run(tmp_path):
    empty = Schedule(Reach.load(tmp_path / "no record"))
    code = (ROOT / "attnzoo/spec/patterns.py").read_text()
    line = next(line for line, place in places(code).of_line.items() if place.function)
    mutant = Mutant("attnzoo/spec/patterns.py", line, "", "", "")
    first, *others = empty.batches(mutant)
    assert first[0] == "tests/spec/test_patterns.py" and len(first) < 5 and empty.executes(mutant)
    assert [*first, *itertools.chain(*others)] == nearest_tests("attnzoo/spec/patterns.py")


@pytest.fixture
def batches(tmp_path, monkeypatch):
    """Return a function of seconds by test file. It returns the batches for a statement that one test of each executes.

    The tests have the name ``test_area``.
    """

    def batches(seconds, text="def test_area():\n"):
        area = {"a.py": {"Pattern.area": [KNOWN.hashes["Pattern.area"], {"7": [0]}]}}
        rows = [
            {"file": file, "hash": "", "seconds": {f"{file}::test_area": cost}, "reached": area}
            for file, cost in seconds.items()
        ]
        (tmp_path / "record").write_text("\n".join(map(json.dumps, rows)))
        monkeypatch.setattr(schedule, "_places", lambda path: KNOWN)
        monkeypatch.setattr(schedule, "_text", lambda path: text)
        monkeypatch.setattr(schedule, "group_of", lambda source, test: 0 if "near" in test else 1)
        monkeypatch.setattr(schedule, "nearest_tests", lambda path: ["near.py"])
        mutant = Mutant("a.py", line_of("return 0"), "", "", "")
        return Schedule(Reach.load(tmp_path / "record")).batches(mutant)

    return batches


def test_executing_tests_run_in_batches_nearest_and_cheapest_file_first(batches):
    seconds = {f"{number}.py": 9.0 - number for number in range(7)}
    first, second, last = batches({**seconds, "near.py": 50.0})
    assert first == [f"{file}::test_area" for file in ("near.py", "6.py", "5.py")]
    assert second == [f"{number}.py::test_area" for number in (4, 3, 2, 1, 0)]
    assert last == ["near.py"], "in the end, all test files run"


def test_a_test_that_is_gone_does_not_run(batches):
    assert batches({"near.py": 1.0}, text="def test_other():\n") == [["near.py"]]


def test_only_a_complete_and_present_record_says_that_no_test_executes_a_statement(reach, monkeypatch):
    monkeypatch.setattr(schedule, "_places", lambda path: KNOWN)
    monkeypatch.setattr(schedule, "test_files", lambda: ["tests/test_a.py"])
    mutant = Mutant("b.py", line_of("return x"), "", "", "")
    reach.hashes["tests/test_a.py"] = text_hash("the present text")
    monkeypatch.setattr(schedule, "_text", lambda path: "the present text")
    assert not Schedule(reach).executes(mutant)
    monkeypatch.setattr(schedule, "_text", lambda path: "a new test")
    assert Schedule(reach).executes(mutant)
    monkeypatch.setattr(schedule, "_text", lambda path: "the present text")
    monkeypatch.setattr(schedule, "test_files", lambda: ["tests/test_a.py", "tests/test_new.py"])
    assert Schedule(reach).executes(mutant)
