"""The page about ``verify`` has a row for every comparison, and says what failed."""

import math

import pytest

import attnzoo
from attnzoo.conformance.attention_check import AttentionReport
from attnzoo.conformance.error_rule import Check
from attnzoo.reporting.html.page import render
from attnzoo.reporting.html.verification import is_verification, page_of
from attnzoo.verification.reports import Passages, Report
from tests.support.report_pages import Parsed, specifications, without_vega


def report(error=1.0, what="output", original=2.0, **fields):
    """A report with one site and one output. The budget of every check is 4."""
    check = Check(what, error, 1.0, 1.0, 4.0)
    own = Check("output", original, 1.0, 1.0, 4.0)
    sites = (AttentionReport("layers.0.attention", "flash", (check, Check("gradient", 0.5, 1.0, 1.0, 4.0))),)
    original_sites = (AttentionReport("layers.0.attention", "model's own", (own,)),)
    return Report("sdpa", sites, (Check("logits", 0.4, 1.0, 1.0, 4.0),), (own,), original_sites, **fields)


def rows(page):
    (section,) = page.sections
    (table,) = section.tables
    return [dict(zip(table.columns, (cell.text for cell in cells), strict=True)) for _, cells in table.rows]


def test_every_comparison_has_a_row_and_a_point():
    page = page_of(report().to_dict())
    assert [(row["where"], row["compared"], row["of budget"], row["own code"]) for row in rows(page)] == [
        ("layers.0.attention", "output", "0.25", "0.50"),
        ("layers.0.attention", "gradient", "0.12", "-"),
        ("whole model", "logits", "0.10", "-"),
        ("whole model", "output", "-", "0.50"),
    ]
    (spec,) = specifications(page)
    points = [(point["row"], point["series"], point["share"]) for point in spec["data"]["values"]]
    assert (1, "the model's own code", 0.5) in points and (1, "sdpa", 0.25) in points and len(points) == 5
    assert page.ok and page.verdict == "Within the error rule on 1 passage"


@pytest.mark.parametrize("error", [4.5, math.inf])
def test_a_failed_comparison_fails_the_page(error):
    page = page_of(report(error).to_dict())
    assert not page.ok and page.verdict == "NOT within the error rule on 1 of 1 passage"
    assert [row["verdict"] for row in rows(page)] == ["fails", "ok", "ok", "ok"]


def test_a_failure_of_the_own_code_is_a_failure():
    page = page_of(report(original=5.0).to_dict())
    assert not page.ok and rows(page)[0]["verdict"] == "fails"


def test_passages_show_the_worst_error():
    page = page_of(Passages((report(1.0), report(3.0), report(5.0), report(2.0))).to_dict())
    assert rows(page)[0]["of budget"] == "1.25" and page.verdict == "NOT within the error rule on 1 of 4 passages"
    assert any("the worst of 4 passages" in note for note in page.sections[0].notes)


def test_remarks_are_notes():
    fields = dict(fault="a fault", note="a remark", changed="window of 4 keys", distance={"logits": 0.25})
    notes = " ".join(page_of(report(**fields).to_dict()).sections[0].notes)
    for text in ("not run: a fault", "a remark.", "window of 4 keys", "logits differs", "0.25 of the largest"):
        assert text in notes


def test_the_command_adds_model_machine_and_command_line():
    data = {**report().to_dict(), "model": "led", "command": "attnzoo verify led", "created": "today"}
    page = page_of({**data, "versions": {"torch": "2", "cpu": "a CPU"}})
    assert page.title == "led: sdpa against the original" and page.commands == ("attnzoo verify led",)
    assert dict(page.facts) == {"PyTorch": "2", "CPU": "a CPU", "started": "today"}


def test_a_report_of_python_gives_a_page(monkeypatch):
    import torch

    from tests.support.models import causal_inputs, gpt_neox

    without_vega(monkeypatch)
    with torch.random.fork_rng():
        verified = attnzoo.verify(gpt_neox(), causal_inputs(12, "none"), "sdpa", fast=True)
    data = verified.to_dict()
    assert is_verification(data) and not is_verification({"rows": []})
    page = Parsed(render(page_of(data)))
    assert all(site.name in page.text for site in verified.sites) and "Within the error rule" in page.text
