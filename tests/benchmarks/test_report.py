"""The page about a shootout shows every row, and no speed of a wrong one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attnzoo.benchmarks.report import page_of
from attnzoo.benchmarks.rows import Shootout
from attnzoo.reporting.html.page import render
from tests.support.report_pages import Parsed, specifications, without_vega

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*/*.json"))


def rows(page):
    return [
        dict(zip(table.columns, (cell.text for cell in cells), strict=True))
        for section in page.sections
        for table in section.tables
        for _, cells in table.rows
    ]


def notes(page):
    return " ".join(note for section in page.sections for note in section.notes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_page_has_a_line_for_every_row_of_a_result(path):
    result = Shootout.read(path)
    page = page_of(result)
    assert page.ok and len(rows(page)) == len(result.rows)
    assert set(page.series) == {row.label for row in result.rows}
    points = [point for spec in specifications(page) for point in spec["data"]["values"]]
    assert {(point["series"], point["tokens"]) for point in points} == {(row.label, row.seq_len) for row in result.rows}


def test_the_page_of_a_run(shootout, monkeypatch):
    without_vega(monkeypatch)
    result = shootout("sdpa", "absent", "wrong", modes=(False, True), seq_lens=(24, 40))
    page = page_of(result)
    assert not page.ok and page.verdict == f"NOT within the error rule, or failed: 4 of {len(result.rows)} results"
    wrong = [row for row in rows(page) if row["contender"] == "wrong"]
    assert len(wrong) == 4 and all(row["speed"] == row["time"] == "-" and row["verdict"] == "wrong" for row in wrong)
    assert not any(point["series"] == "wrong" for spec in specifications(page) for point in spec["data"]["values"])
    assert "absent at 24, 40 tokens: refused: " in notes(page) and "outside the error budget" in notes(page)
    titles = [section.title for section in page.sections]
    assert titles[:2] == ["tiny: forward", "tiny: forward+backward"]
    assert page.commands[0].startswith("attnzoo bench --model tiny") and dict(page.facts)["Python"]
    text = Parsed(render(page)).text
    assert "tiny-led: whole model" in text and all(row.label in text for row in result.rows)


def test_highlights_are_of_the_longest_input():
    result = Shootout.read(RESULTS / "epyc" / "longt5_local-attention-forward.json")
    best = max(row.speedup for row in result.rows if row.seq_len == 16384 and row.speedup)
    assert page_of(result).highlights[0] == (f"{best:.2f}x", "speed: sdpa, longt5_local, forward at 16384 tokens")


def test_the_patch_that_only_counts_is_no_highlight():
    result = Shootout.read(RESULTS / "epyc" / "led-attention-forward.json")
    changed = tuple(replace(row, backend="counting") if row.backend == "sdpa" else row for row in result.rows)
    assert "counting" not in str(page_of(replace(result, rows=changed)).highlights)


def test_columns_that_only_some_scopes_have():
    result = Shootout.read(RESULTS / "epyc" / "led-attention-forward.json")
    changed = tuple(replace(row, recall=0.5, overhead=2e-6) for row in result.rows)
    page = page_of(replace(result, rows=changed))
    assert "overhead: CPU time" in notes(page) and "recall: this backend" in notes(page)
    assert "overhead" not in notes(page_of(result)) and "recall" not in notes(page_of(result))
    for row in rows(page):
        assert row["recall"] == "0.500" and row["overhead"] == "2 us"


def test_reports_of_whole_models_can_be_unfolded(shootout):
    result = shootout("sdpa", check=lambda job: (True, "a  table"))
    (details,) = [section.details for section in page_of(result).sections if section.details]
    assert details == (("tiny, sdpa, forward at 1024 tokens: ok", "a  table"),)
