"""Charts as Vega-Lite specifications. The page adds theme, colours and width, and filters by the field ``series``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Records = Sequence[dict[str, Any]]


class Unit(NamedTuple):
    """How an axis shows values: a Vega expression for the text of a tick, and where the ticks are.

    Ticks are powers of ``base`` times ``size``, or these times few round numbers.
    """

    expression: str
    base: float
    size: float


_SECONDS = "datum.value >= 1 ? format(datum.value, '~r') + ' s' : format(datum.value * 1000, '.3~r') + ' ms'"
SECONDS = Unit(_SECONDS, 10, 1.0)
BYTES = Unit("format(datum.value / 1048576, ',.4~r') + ' MiB'", 2, float(1 << 20))
_TIMES = "format(datum.value, '~r') + 'x'"
_HEIGHT, _POINT, _MARGIN = 250, 70, 1.3
_SHARE = {
    "field": "share",
    "type": "quantitative",
    "scale": {"domainMin": 0},
    "axis": {"title": "error, share of the budget", "tickCount": 5},
}
_COLOUR = {"field": "series", "type": "nominal", "legend": None}


def _tooltip(fields: Sequence[str]) -> list[dict[str, str]]:
    return [{"field": field, "type": "nominal"} for field in fields]


def _rule(axis: str, value: float) -> dict[str, Any]:
    mark = {"type": "rule", "strokeDash": [4, 4], "opacity": 0.7}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": {axis: {"datum": value, "type": "quantitative"}}}


def _ticks(low: float, high: float, base: float, unit: float) -> list[float]:
    """Return ticks of a logarithmic axis between two positive values: powers of ``base`` times few round numbers."""
    steps = (1, 1.5, 2, 3, 5, 7) if base == 10 else (1, 1.5) if high < 8 * low else (1,)
    first, last = (math.floor(math.log(value / unit, base)) for value in (low, high))
    ticks = [unit * step * base**power for power in range(first, last + 1) for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _even_ticks(high: float, unit: Unit) -> list[float]:
    """Return about three ticks of a linear axis from 0 to ``high``, at round multiples of the unit."""
    step = high / 3 / unit.size
    power = 10 ** math.floor(math.log10(step)) if step > 0 else 1
    step = unit.size * min((n * power for n in (1, 2, 5, 10)), key=lambda tick: abs(tick - step))
    return [step * number for number in range(int(high / step) + 1)]


def over_length(records: Records, value: str, unit: Unit, tooltip: Sequence[str]) -> dict[str, Any]:
    """Return lines over the input length, both scales logarithmic. For a single length, return horizontal bars.

    Args:
        records: one record per contender and length, with the fields ``series``, ``tokens`` and ``value``. If they have
            ``fastest`` and ``slowest``, a line shows this range.
        value: the field on the value axis.
        unit: the unit of the values.
        tooltip: the fields that a point shows.
    """
    if len({record["tokens"] for record in records}) == 1:
        return _bars(records, value, unit, tooltip)
    return _lines(records, value, unit, tooltip)


def _bars(records: Records, value: str, unit: Unit, tooltip: Sequence[str]) -> dict[str, Any]:
    names = list(dict.fromkeys(record["series"] for record in records))
    ticks = _even_ticks(max(record[value] for record in records), unit)
    axis = {"labelExpr": unit.expression, "title": None, "values": ticks, "labelFlush": False}
    height = max(_HEIGHT, 22 * len(names))
    return {
        "data": {"values": list(records)},
        "height": height,
        "mark": {"type": "bar", "height": min(36, 0.6 * height / len(names))},
        "encoding": {
            "y": {"field": "series", "type": "nominal", "sort": names, "axis": {"title": None, "labelLimit": 120}},
            "x": {"field": value, "type": "quantitative", "axis": axis},
            "color": _COLOUR,
            "tooltip": _tooltip(tooltip),
        },
    }


def _lines(records: Records, value: str, unit: Unit, tooltip: Sequence[str]) -> dict[str, Any]:
    lengths = sorted({record["tokens"] for record in records})
    x = {
        "field": "tokens",
        "type": "quantitative",
        "scale": {"type": "log", "base": 2, "nice": False},
        "axis": {"values": lengths, "labelExpr": "datum.value", "labelOverlap": "greedy", "title": "tokens"},
    }
    seen = [record[field] for record in records for field in (value, "fastest", "slowest") if field in record]
    low, high = min(seen) / _MARGIN, max(seen) * _MARGIN
    ticks = _ticks(low, high, unit.base, unit.size)
    y = {
        "field": value,
        "type": "quantitative",
        "scale": {"type": "log", "domain": [low, high], "nice": False},
        "axis": {"labelExpr": unit.expression, "title": None, "values": ticks, "labelOverlap": "greedy"},
    }
    layers: list[dict[str, Any]] = []
    if all("fastest" in record for record in records):
        spread = {"y": {**y, "field": "fastest"}, "y2": {"field": "slowest"}}
        layers.append({"mark": {"type": "rule", "opacity": 0.6, "strokeWidth": 3}, "encoding": spread})
    mark = {"type": "line", "point": {"size": _POINT, "filled": True}, "strokeWidth": 2}
    layers.append({"mark": mark, "encoding": {"y": y, "tooltip": _tooltip(tooltip)}})
    encoding = {"x": x, "color": _COLOUR}
    return {"data": {"values": list(records)}, "height": _HEIGHT, "encoding": encoding, "layer": layers}


def error_beside_speed(records: Records, tooltip: Sequence[str]) -> dict[str, Any]:
    """Return points: the fields ``speedup`` (above 1 is faster than the original) and ``share`` of the error budget."""
    low, high = min(speeds := [1.0, *(record["speedup"] for record in records)]) / _MARGIN, max(speeds) * _MARGIN
    encoding = {
        "x": {
            "field": "speedup",
            "type": "quantitative",
            "scale": {"type": "log", "domain": [low, high], "nice": False},
            "axis": {"labelExpr": _TIMES, "title": "speed against the original", "values": _ticks(low, high, 10, 1)},
        },
        "y": _SHARE,
        "color": _COLOUR,
        "tooltip": _tooltip(tooltip),
    }
    points = {"mark": {"type": "point", "filled": True, "size": 110, "opacity": 0.85}, "encoding": encoding}
    layers = [_rule("y", 1), _rule("x", 1), points]
    return {"data": {"values": list(records)}, "height": _HEIGHT, "layer": layers}


def shares(records: Records, tooltip: Sequence[str]) -> dict[str, Any]:
    """Return points: the ``share`` of the error budget for each comparison, by the ``row`` of the table."""
    encoding = {
        "x": {
            "field": "row",
            "type": "quantitative",
            "scale": {"nice": False, "padding": 10, "zero": False},
            "axis": {"title": "comparison, by its number in the table", "tickMinStep": 1, "format": "d", "grid": False},
        },
        "y": _SHARE,
        "color": _COLOUR,
        "tooltip": _tooltip(tooltip),
    }
    points = {"mark": {"type": "point", "filled": True, "size": 80, "opacity": 0.8}, "encoding": encoding}
    return {"data": {"values": list(records)}, "height": _HEIGHT, "layer": [_rule("y", 1), points]}
