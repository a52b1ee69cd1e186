"""A page is one file: it loads nothing, runs only its own scripts, and shows text from JSON as text."""

import base64
import hashlib
import sys
from dataclasses import replace

import pytest

from attnzoo.errors import InvalidArgumentError
from attnzoo.reporting.html import engine
from attnzoo.reporting.html.content import Cell, Chart, Page, Section, Table
from attnzoo.reporting.html.page import render
from tests.support.report_pages import SCRIPT, Parsed, without_vega

EVIL = "\"'></script><img src=x onerror=alert(1)>&"
TABLE = Table(
    ("name", "error"),
    (("a", (Cell("a", "a"), Cell("2.0", 2.0, "bad", bar=1.5))), ("b", (Cell("b"), Cell("-")))),
    ("error",),
)
CHART = Chart("Time", "Lower is better.", {"data": {"values": [{"series": "a", "value": float("inf")}]}, "mark": "bar"})
PAGE = Page(
    "title", "subtitle", False, "NOT within", (("2.0x", "speed"),), (("CPU", "a CPU"),), ("attnzoo bench",), ("a", "b"),
    (Section("first", (CHART,), (TABLE,), ("a note",), (("more", "  a  report"),)), Section("second", (CHART,))),
)  # fmt: skip


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    without_vega(monkeypatch)


def test_the_page_shows_every_part():
    page = Parsed(render(PAGE))
    for text in ("title", "subtitle", "NOT within", "2.0x", "CPU", "a CPU", "attnzoo bench", "first", "a note", "more"):
        assert text in page.text
    assert "  a  report" in page.texts, "preformatted text keeps its spaces"


def test_text_cannot_become_markup():
    table = Table((EVIL,), ((EVIL, (Cell(EVIL, EVIL),)),))
    chart = Chart(EVIL, EVIL, {"data": {"values": [{"series": EVIL}]}})
    section = Section(EVIL, (chart,), (table,), (EVIL,), ((EVIL, EVIL),))
    page = Parsed(render(Page(EVIL, EVIL, True, EVIL, ((EVIL, EVIL),), ((EVIL, EVIL),), (EVIL,), (EVIL,), (section,))))
    plain = Parsed(render(Page("", "", True, "", (("", ""),), (("", ""),), ("",), ("",), (
        Section("", (Chart("", "", chart.spec),), (Table(("",), (("", (Cell("", ""),)),)),), ("",), (("", ""),)),
    ))))  # fmt: skip
    assert [tag for tag, _ in page.tags if tag != "wbr"] == [tag for tag, _ in plain.tags]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.data["series"][0][0] == page.data["specs"][0]["data"]["values"][0]["series"] == EVIL


def test_the_page_loads_nothing_from_elsewhere():
    page = Parsed(render(PAGE))
    assert not any({"src", "href", "srcset", "action"} & set(attributes) for _, attributes in page.tags)
    assert not page.of("link") and not page.of("iframe")


def test_the_browser_runs_only_the_scripts_of_the_page():
    page = Parsed(render(PAGE))
    (policy,) = [a["content"] for _, a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "'unsafe-inline'" not in policy.partition("script-src")[2]
    data, vega, ours = page.scripts
    assert vega == SCRIPT and data.startswith("{")
    for script in (vega, ours):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_the_data_has_the_charts_in_order_and_no_infinity():
    page = Parsed(render(PAGE))
    assert [a["data-chart"] for _, a in page.of("div") if "data-chart" in a] == ["0", "1"]
    assert [spec["data"]["values"][0]["value"] for spec in page.data["specs"]] == [None, None]
    assert [name for name, _ in page.data["series"]] == ["a", "b"] and len({c for _, c in page.data["series"]}) == 2


def test_cells_carry_what_sorting_and_narrow_screens_need():
    page = Parsed(render(PAGE))
    (_, name), (_, error), (_, missing), (_, dash) = page.of("td")
    assert name["data-label"] == "name" and name["data-order"] == "a" and name["class"] == ""
    assert error == {"class": "number bad", "data-label": "error", "data-order": "2.0"}
    assert "data-order" not in missing and "data-order" not in dash, "cells without a value sort behind all others"
    assert [attributes["value"] for _, attributes in page.of("meter")] == ["1.000"]
    assert [attributes["data-name"] for _, attributes in page.of("tr") if attributes] == ["a", "b"]


def test_many_series_share_colours_but_not_with_the_original():
    page = replace(PAGE, series=tuple(map(str, range(20))))
    first, *others = page.colours.values()
    assert len(page.colours) == 20 and first not in others


def test_vega_is_one_script_without_the_end_of_a_script():
    pytest.importorskip("vl_convert")
    script = engine.javascript()
    assert "vegaEmbed" in script and "</script" not in script and 500_000 < len(script) < 1_500_000


@pytest.mark.parametrize("module", [None, object()], ids=["missing", "broken"])
def test_a_missing_package_names_the_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "vl_convert", module)
    with pytest.raises(
        InvalidArgumentError, match=r"vl-convert-python does not work .*pip install 'attnzoo\[report\]'"
    ):
        engine.javascript()
