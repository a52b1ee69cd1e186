"""Charts are valid Vega-Lite, with ticks that a reader can name."""

import json
import math

import pytest

from attnzoo.reporting.html import charts

RECORDS = [
    {"series": series, "tokens": tokens, "value": tokens / 1e4 * factor, "bytes": tokens * 1e4 * factor,
     "fastest": 0.9e-4 * tokens * factor, "slowest": 1.1e-4 * tokens * factor,
     "speedup": 1 / factor, "share": factor / 3, "row": tokens}
    for tokens in (1024, 2048, 8192)
    for series, factor in (("original", 1.0), ("sdpa", 0.4))
]  # fmt: skip
AT_ONE_LENGTH = [record for record in RECORDS if record["tokens"] == 2048]
CHARTS = {
    "lines of times": charts.over_length(RECORDS, "value", charts.SECONDS, ("series",)),
    "lines of bytes": charts.over_length(RECORDS, "bytes", charts.BYTES, ("series",)),
    "bars of times": charts.over_length(AT_ONE_LENGTH, "value", charts.SECONDS, ("series",)),
    "bars of bytes": charts.over_length(AT_ONE_LENGTH, "bytes", charts.BYTES, ("series",)),
    "error beside speed": charts.error_beside_speed(RECORDS, ("series", "tokens")),
    "shares": charts.shares(RECORDS, ("series", "tokens")),
}


def encodings(spec):
    return [spec["encoding"]] if "layer" not in spec else [layer["encoding"] for layer in spec["layer"]]


@pytest.mark.parametrize("name", CHARTS)
def test_vega_lite_compiles(name):
    """Vega-Lite only warns about most mistakes, so the compiled marks and scales are checked, too."""
    vl_convert = pytest.importorskip("vl_convert")
    compiled = vl_convert.vegalite_to_vega(json.dumps({**CHARTS[name], "width": 300}))
    assert compiled["marks"] and {scale["name"] for scale in compiled["scales"]} >= {"x", "y", "color"}


@pytest.mark.parametrize("name", CHARTS)
def test_fields_of_a_chart_are_in_its_records(name):
    spec = CHARTS[name]
    used = [*encodings(spec), spec.get("encoding", {})]
    fields = {
        channel["field"]
        for encoding in used
        for channel in encoding.values()
        if isinstance(channel, dict) and "field" in channel
    }
    assert fields and fields <= set(spec["data"]["values"][0])


def test_one_length_gives_bars_and_several_give_lines():
    assert CHARTS["bars of times"]["mark"]["type"] == "bar"
    assert [layer["mark"]["type"] for layer in CHARTS["lines of times"]["layer"]] == ["rule", "line"]
    assert CHARTS["lines of times"]["encoding"]["x"]["axis"]["values"] == [1024, 2048, 8192]


def test_ticks_are_round_and_inside():
    y = CHARTS["lines of bytes"]["layer"][-1]["encoding"]["y"]
    low, high = y["scale"]["domain"]
    ticks = y["axis"]["values"]
    assert len(ticks) >= 3 and all(low <= tick <= high for tick in ticks)
    assert all(math.log2(tick / 2**20).is_integer() for tick in ticks), "powers of two in MiB"
    narrow = charts.over_length([*RECORDS[:1], {**RECORDS[0], "tokens": 2048}], "value", charts.SECONDS, ())
    assert narrow["layer"][-1]["encoding"]["y"]["axis"]["values"], "a narrow range has a tick, too"


@pytest.mark.parametrize(("largest", "ticks"), [(14.08, [0, 5, 10]), (48.0, [0, 20, 40]), (0.0, [0.0])])
def test_bars_have_even_ticks(largest, ticks):
    records = [{"series": "a", "tokens": 1, "value": largest}]
    assert charts.over_length(records, "value", charts.SECONDS, ())["encoding"]["x"]["axis"]["values"] == ticks
