"""The report: red lines first, then the original beside the best of ours."""

from __future__ import annotations

import pytest

from attnzoo.benchmarks.gpu.against import comparison
from attnzoo.benchmarks.gpu.report import compare, red_lines, report
from attnzoo.benchmarks.gpu.results import Call, Verdict
from tests.support.gpu_rows import ended, index, red, results, row

CASE = "led, module, forward, S = 16384"


def test_original_best_auto_and_peer_stand_in_one_line():
    ours = [row("sdpa", 0.5), row("triton", 0.25, peak_ratio=0.1), row("auto", 0.26)]
    rows = [row("native"), *ours, row("FA2", 0.2, peer=True)]
    (case,) = compare(rows)
    assert [part.backend for part in (case.original, case.best, case.auto, case.peer)] == [
        *("native", "triton", "auto", "FA2"),
    ]
    assert (
        "| led | 16384 | 1.00 s | 250 ms | triton | 4.00x | 0.10x | 260 ms | 3.85x | 200 ms FA2 |"
        in report(index(), results(*rows)).splitlines()
    )


def test_cases_are_not_mixed():
    rows = [row("native"), row("sdpa", 0.5, seq_len=4096), row("sdpa", 0.5, mode="forward+backward")]
    assert [(case.original is None, case.best is None) for case in compare(rows)] == [
        *((False, True), (True, False), (True, False)),
    ]


@pytest.mark.parametrize(("seconds", "is_red"), [(1.02, False), (1.04, True)])
def test_auto_slower_than_the_original_is_red(seconds, is_red):
    found = results(row("native"), row("auto", seconds, kernel="native"))
    expected = [f"{CASE}: auto (native) takes {seconds:.2f} s, the original 1.00 s"]
    assert red_lines(index(), found) == expected * is_red
    assert red_lines(index(tiny=True), found) == [], "times of a tiny run mean nothing"


def test_wrong_numbers_and_exceptions_are_red():
    found = results(row("native"), red("sdpa"), row("flex", None, reason="RuntimeError: fell over"), red("peer"))
    found = found._replace(verdicts=(Verdict("led, whole model: sdpa", "red", "q.grad\nmore"), Verdict("x", "ok", "")))
    item = ended("calls", "failed", "exit code 1: no")
    late, hung = ended("decode", "killed", "the end of the session"), ended("modules", "overran", "its limit")
    lines = red_lines(index(item, late, hung), found)
    assert lines[:3] == [
        "item calls: exit code 1: no",
        "item modules: its limit",
        "led, whole model: sdpa: red: q.grad",
    ]
    assert f"{CASE}: sdpa: red: outside the error budget" in lines
    assert f"{CASE}: flex: failed: RuntimeError: fell over" in lines
    text = report(index(item, late, hung), found)
    assert f"## Red lines: {len(lines)}" in text and "- **RED** item calls" in text and "- x: ok\n" in text


def test_peers_and_the_original_are_never_red():
    rows = row("native", None, reason="RuntimeError: no"), row("FA2", None, peer=True, reason="RuntimeError: no")
    assert red_lines(index(), results(*rows)) == []


def test_memory_that_the_original_lacks_too_is_not_red():
    ours = row("sdpa", None, reason="OutOfMemoryError: CUDA out of memory")
    assert red_lines(index(), results(row("native", None, reason="OutOfMemoryError: no"), ours)) == []
    assert len(red_lines(index(), results(row("native"), ours))) == 1


def test_calls_have_a_table():
    call = Call("led", "triton", 1024, "forward", 5, 0, 1e-4, 2e-3)
    text = report(index(), results(calls=[call, Call("led", "sdpa", 1024, "forward", None, 2, None, 1e-3)]))
    assert "| led | forward | 1024 | triton | 5 | 0 | 0.10 ms | 2.00 ms |" in text
    assert "| led | forward | 1024 | sdpa | - | 2 | - | 1.00 ms |" in text


def test_two_sessions_are_compared_row_by_row():
    before = index(), results(row("native"), row("sdpa", 0.5), row("auto", 2.0), row("flex"))
    now = index(), results(row("native"), row("sdpa", 0.25), row("auto", 1.0), red("triton"))
    text = comparison(before, now)
    assert f"| {CASE} | original | 1.00 s | 1.00 s | 1.00x |  |" in text
    assert f"| {CASE} | sdpa | 500 ms | 250 ms | 2.00x | faster |" in text
    assert f"- **new RED** {CASE}: triton: red: outside the error budget" in text and "- mended: led" in text
    assert "Red lines: 1 before, 1 now" in text and "1 rows are in one of the sessions only" in text
    assert "slower" in comparison(now, before) and "Different machines" not in text
