"""A report is ok only if every check of every kind passes, and if something was compared at each site."""

from dataclasses import replace

import pytest

from attnzoo.conformance.attention_check import AttentionReport
from attnzoo.conformance.error_rule import Check
from attnzoo.verification.reports import Passages, Report


@pytest.fixture(autouse=True)
def width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


GOOD, BAD = Check("output", 0.5, 0.1, 1.0, 1.0), Check("gradient", 1.5, 0.1, 1.0, 1.0)
FINE = AttentionReport("a", "flash", (GOOD,))
WRONG = AttentionReport("b", "flash_cpu", (GOOD, BAD))
RIGHT = Report("sdpa", (FINE, FINE), (GOOD, GOOD), (GOOD, GOOD), (FINE, FINE))

NOT_OK = {
    "a check of one site": dict(sites=(FINE, WRONG)),
    "one output of the patched model": dict(end_to_end=(GOOD, BAD)),
    "the first output of the patched model": dict(end_to_end=(BAD, GOOD)),
    "one output of the original": dict(original=(GOOD, BAD)),
    "a check of one original site": dict(original_sites=(FINE, WRONG)),
    "an output that is NaN": dict(end_to_end=(GOOD, replace(GOOD, error=float("nan")))),
    "an output that is infinite": dict(end_to_end=(GOOD, replace(GOOD, error=float("inf")))),
    "no site": dict(sites=()),
    "no output of the patched model": dict(end_to_end=()),
    "a site without a check": dict(sites=(FINE, AttentionReport("c", "flash", ()))),
}


@pytest.mark.parametrize("changes", NOT_OK.values(), ids=NOT_OK)
def test_report_is_not_ok_because_of(changes):
    report = replace(RIGHT, **changes)
    assert not report.ok and report.to_dict()["ok"] is False
    for several in ((RIGHT, report), (report, RIGHT)):
        assert not Passages(several).ok and Passages(several).to_dict()["ok"] is False


@pytest.mark.parametrize("changes", [{}, dict(original=(), original_sites=(), fault="it forgets a mask")])
def test_report_is_ok(changes):
    report = replace(RIGHT, **changes)
    assert report.ok and report.to_dict()["ok"] is True and Passages((report, report)).ok


def test_no_passage_is_not_ok():
    assert not Passages(()).ok


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (dict(sites=(FINE, WRONG)), "b: gradient: error 1.5, budget 1 (eager 0.1): FAILS"),
        (dict(end_to_end=(GOOD, BAD)), "model: gradient: error 1.5, budget 1 (eager 0.1): FAILS"),
        (dict(original=(GOOD, BAD)), "original model: gradient: error 1.5, budget 1 (eager 0.1): FAILS"),
        (dict(original_sites=(FINE, WRONG)), "original b: gradient: error 1.5, budget 1 (eager 0.1): FAILS"),
    ],
)
def test_text_names_the_place_of_the_failed_check(changes, line):
    text = str(replace(RIGHT, **changes))
    assert [row for row in text.splitlines() if row.endswith("FAILS")] == [line]
    verdict = " ".join(text[text.index("backend 'sdpa'") :].split())
    if "original" in line:
        own = "the model's own code: NOT within the error rule (check the adapter)"
        assert verdict == f"backend 'sdpa': within the error rule; {own}"
    else:
        assert verdict == "backend 'sdpa': NOT within the error rule"


@pytest.mark.parametrize(
    "change", [dict(end_to_end=(GOOD, BAD)), dict(original=(GOOD, BAD)), dict(original_sites=(WRONG,))]
)
def test_text_counts_the_passages_that_are_not_ok(change):
    text = " ".join(str(Passages((RIGHT, replace(RIGHT, **change)))).split())
    assert text.removesuffix(" (check the adapter)").endswith("NOT within the error rule on 1 of 2 passages")


def test_text_says_that_no_attention_ran_on_one_of_the_passages():
    text = str(Passages((RIGHT, replace(RIGHT, sites=()))))
    assert text.endswith("backend 'sdpa': NOT shown to be within the error rule: no attention of the model ran")


def test_plain_data_has_the_verdict_of_each_check_and_site():
    data = replace(RIGHT, sites=(FINE, WRONG), original=(GOOD, BAD)).to_dict()
    assert [site["ok"] for site in data["sites"]] == [True, False]
    assert [check["ok"] for check in data["sites"][1]["checks"]] == [True, False]
    assert [check["ok"] for check in data["original"]] == [True, False]
    assert [check["ok"] for check in data["end_to_end"]] == [True, True]
