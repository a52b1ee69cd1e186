"""The text of a ``verify`` report: one row per site, within the terminal width, for any number of passages."""

import pytest

from attnzoo.conformance.attention_check import AttentionReport
from attnzoo.conformance.error_rule import Check
from attnzoo.verification.reports import Passages, Report

LONG = "model.encoder.layers.0.some_quite_long_name.of_an_attention_module.self_attention"


def check(what, error, budget=1.0):
    return Check(what, error, budget / 10, 1.0, budget)


def report(error=0.5, original=0.25, names=(LONG, "b")):
    sites = tuple(
        AttentionReport(name, kernel, (check("output", output_error), check("gradient", error)))
        for name in names
        for kernel, output_error in (("flash", 0.1), ("flash_cpu", 0.2))
    )
    original_sites = tuple(AttentionReport(name, "native", (check("output", original),)) for name in names)
    return Report("sdpa", sites, (check("logits", 0.125),), (check("logits", 0.0625),), original_sites)


@pytest.fixture(autouse=True)
def width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_each_site_has_one_row_with_its_worst_check():
    text = str(report())
    assert text.count(f"{LONG}\n") == 1 and text.count("flash+flash_cpu") == 2
    assert "0.50       0.25      flash+flash_cpu  b\n" in text
    assert "0.12       0.06                       logits\n" in text
    assert all(len(line) <= 80 or line.strip() == LONG for line in text.splitlines())
    assert text.endswith("backend 'sdpa': within the error rule")


def test_failed_check_has_a_line_with_its_numbers():
    text = str(report(error=1.5))
    assert "1.5 FAILS  0.25" in text
    assert f"{LONG}: gradient: error" in text.replace("\n  ", " ") and "budget 1 (eager 0.1): FAILS" in text
    assert text.endswith("NOT within the error rule")
    assert "original b: output: error 2, budget 1 (eager 0.1): FAILS" in str(report(original=2.0))


def test_several_passages_make_one_table():
    several = Passages((report(0.5), report(0.75), report(0.25)))
    assert several.ok and str(several).count("flash+flash_cpu  b") == 1 and "0.75       0.25" in str(several)
    assert str(several).endswith("within the error rule on all 3 passages")
    failing = Passages((report(0.5), report(2.0), report(float("inf"))))
    assert not failing.ok and str(failing).endswith("NOT within the error rule on 2 of 3 passages")
    assert "inf FAILS" in str(failing)
    data = failing.to_dict()
    assert data["ok"] is False and [passage["ok"] for passage in data["passages"]] == [True, False, False]
    assert len(data["passages"][0]["sites"]) == 4


def test_original_that_did_not_run_has_no_numbers():
    plain = report()
    text = str(Report(plain.backend, plain.sites, plain.end_to_end, (), fault="it forgets a mask"))
    assert "0.50       -         flash+flash_cpu  b" in text and "the original was not run: it forgets a mask" in text
    assert "; -: not compared\n" in text.replace("\n  ", " ")
    assert "-: not compared" not in str(plain), "every number is there"
