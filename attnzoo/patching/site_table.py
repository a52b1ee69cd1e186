"""The table of the kernels that ran at the sites of a patch."""

from __future__ import annotations

from collections.abc import Iterable

from attnzoo.layout import aligned, group_by, heading
from attnzoo.patching.sites import Site

HEADER = ("backend", "kernel", "calls", "fallbacks", "sites")


def table(sites: Iterable[Site]) -> str:
    """Return a table. Sites with equal class, pattern, backend, kernel and pattern changes share a row.

    If the sites of a row differ in calls or fallbacks, the cell shows the smallest and the largest number, as ``2-4``.
    """
    groups = group_by(sites, lambda site: (site.cls, site.pattern, site.ran, site.kernel, site.approximate))
    return aligned([HEADER, *map(_row, groups)])


def _row(group: list[Site]) -> tuple[str, ...]:
    first = group[0]
    where = heading([site.name for site in group], first.cls, first.pattern)
    changed = f", approximate: {first.approximate}" if first.approximate else ""
    calls, fallbacks = _range([site.calls for site in group]), _range([site.fallbacks for site in group])
    return first.ran, first.kernel or "-", calls, fallbacks, where + changed


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"
