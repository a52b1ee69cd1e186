"""The page about the JSON of ``attnzoo verify``, or of ``Report.to_dict()`` and ``Passages.to_dict()``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnzoo.layout import group_by
from attnzoo.reporting.html import charts
from attnzoo.reporting.html.content import Cell, Chart, Page, Section, Table, facts_of

_MODEL = "whole model"
_ORIGINAL = "the model's own code"
_COLUMNS = ("where", "no.", "compared", "kernel", "error", "budget", "of budget", "own code", "verdict")
_NUMERIC = ("no.", "error", "budget", "of budget", "own code")


@dataclass(frozen=True)
class _Check:
    """A comparison on one passage, as JSON stores it."""

    where: str
    what: str
    kernel: str
    error: float
    budget: float
    ok: bool

    @property
    def share(self) -> float:
        return self.error / self.budget if self.budget else (0.0 if self.error == 0 else math.inf)


def is_verification(data: Mapping[str, Any]) -> bool:
    """Whether the data of a JSON file has the form of a report of ``verify``."""
    return "backend" in data and "ok" in data and ("passages" in data or "end_to_end" in data)


def page_of(data: Mapping[str, Any]) -> Page:
    """Return the page. Fields that only the command writes (command line, versions, time) may be missing."""
    passages: Sequence[Mapping[str, Any]] = data.get("passages", [data])
    backend = str(data["backend"])
    patched = _worst(check for passage in passages for check in _checks(passage, "sites", "end_to_end"))
    original = _worst(check for passage in passages for check in _checks(passage, "original_sites", "original"))
    keys = list(dict.fromkeys([*patched, *original]))
    rows = tuple(_row(number, key, patched.get(key), original.get(key), backend) for number, key in enumerate(keys, 1))
    records = [
        record
        for number, key in enumerate(keys, 1)
        for series, checks in ((_ORIGINAL, original), (backend, patched))
        if (record := _record(number, series, checks.get(key))) is not None
    ]
    failed = sum(not passage["ok"] for passage in passages)
    within = f"Within the error rule on {_count(len(passages), 'passage')}"
    verdict = f"NOT within the error rule on {failed} of {_count(len(passages), 'passage')}" if failed else within
    chart = Chart(
        "Error as a share of its budget",
        "Each point is one comparison with the oracle in float64. Below the dashed line passes.",
        charts.shares(records, ("comparison", "compared", "kernel", "of budget", "series")),
    )
    table = Table(_COLUMNS, rows, _NUMERIC)
    section = Section("Comparisons", (chart,), (table,), tuple(_notes(passages)))
    return Page(
        f"{data['model']}: {backend} against the original" if "model" in data else f"{backend} against the original",
        "attnzoo verify: outputs, gradients and each attention, compared with a float64 oracle",
        bool(data["ok"]),
        verdict,
        tuple(_highlights(patched, original)),
        facts_of(dict(data.get("versions", {})), data.get("created")),
        tuple([str(data["command"])] if "command" in data else []),
        (_ORIGINAL, backend) if backend != _ORIGINAL else (_ORIGINAL,),
        (section,),
    )


_Key = tuple[str, str]


def _checks(passage: Mapping[str, Any], sites: str, whole: str) -> Iterator[_Check]:
    for site in passage[sites]:
        for check in site["checks"]:
            yield _check(site["name"], site["kernel"], check)
    for check in passage[whole]:
        yield _check(_MODEL, "", check)


def _check(where: str, kernel: str, check: Mapping[str, Any]) -> _Check:
    return _Check(where, check["what"], kernel, float(check["error"]), float(check["budget"]), bool(check["ok"]))


def _worst(checks: Iterable[_Check]) -> dict[_Key, _Check]:
    """Return the worst check of all passages and requests, for each place and compared result."""
    groups = group_by(checks, lambda check: (check.where, check.what))
    return {(group[0].where, group[0].what): max(group, key=lambda c: (not c.ok, c.share)) for group in groups}


def _row(
    number: int, key: _Key, patched: _Check | None, original: _Check | None, backend: str
) -> tuple[str, tuple[Cell, ...]]:
    """Return a row. Without a check of the patched model, the numbers are those of the model's own code."""
    check = patched or original
    assert check is not None  # the key comes from one of the two
    own = Cell("-") if original is None else Cell(f"{original.share:.2f}", original.share)
    ok = check.ok and (original is None or original.ok)
    return (backend if patched else _ORIGINAL), (
        Cell(key[0], key[0]),
        Cell(str(number), number),
        Cell(key[1], key[1]),
        Cell(check.kernel or "-", check.kernel),
        Cell(f"{check.error:.2e}", check.error),
        Cell(f"{check.budget:.2e}", check.budget),
        Cell(f"{check.share:.2f}", check.share, bar=check.share) if patched else Cell("-"),
        own,
        Cell("ok" if ok else "fails", int(ok), "good" if ok else "bad"),
    )


def _record(number: int, series: str, check: _Check | None) -> dict[str, Any] | None:
    if check is None:
        return None
    return {
        "row": number, "series": series, "share": check.share, "of budget": f"{check.share:.3g}",
        "comparison": f"{number}: {check.where}", "compared": check.what, "kernel": check.kernel or "-",
    }  # fmt: skip


def _highlights(patched: Mapping[_Key, _Check], original: Mapping[_Key, _Check]) -> Iterator[tuple[str, str]]:
    if patched:
        yield f"{max(check.share for check in patched.values()):.2f}", "largest error of the backend, of its budget"
    if original:
        yield f"{max(check.share for check in original.values()):.2f}", "the same for the model's own code"
    sites = {where for where, _ in patched if where != _MODEL}
    yield str(len(sites)), "attention modules compared"
    yield str(len(patched)), "comparisons with the float64 oracle"


def _notes(passages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    first = passages[0]
    if len(passages) > 1:
        yield f"The table shows the worst of {len(passages)} passages for each comparison."
    yield (
        "of budget: the error divided by the largest error that passes. The error of plain operations in the model's "
        "dtype sets the budget. own code: the same for the model's own code."
    )
    if first.get("fault"):
        yield f"The original was not run: {first['fault']}"
    if first.get("note"):
        yield f"{first['note']}."
    if first.get("changed"):
        yield f"The backend changes the pattern, and the oracle computes the changed pattern: {first['changed']}"
    for what, distance in first.get("distance", {}).items():
        yield f"{what} differs from the unchanged model's {what} by {distance:.2g} of the largest value"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
