"""Measurements for people: tables of what was measured, and what ``auto`` makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnzoo.auto.measurements import Measurement, format_seconds
from attnzoo.layout import fit


class Tuning(tuple[Measurement, ...]):
    """What :func:`attnzoo.tune` found, one measurement per request and size class. Prints as a table.

    Attributes:
        fresh: keys of the measurements that were made now; the others were known.
    """

    fresh: frozenset[str]

    def __new__(cls, found: Iterable[Measurement], fresh: frozenset[str] = frozenset()) -> Tuning:
        made = super().__new__(cls, found)
        made.fresh = fresh
        return made

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data for JSON."""
        return [{**one.to_dict(), "fresh": one.key in self.fresh} for one in self]

    def __str__(self) -> str:
        if not self:
            return "nothing to measure: no attention that more than one backend takes"
        return "\n".join(table(one, "" if one.key in self.fresh else " (known already)") for one in self)


def table(measurement: Measurement, remark: str = "") -> str:
    """One measurement: what it was, then every backend, fastest first, and why the others are no candidates."""
    request = measurement.request
    head = f"{measurement.where}: {request.get('dtype')}, {request.get('heads')} heads x {request.get('head_dim')}, "
    lines = [f"{head}{measurement.size}, {measurement.mode}{remark}"]
    ranking = measurement.ranking()
    for seconds, name in ranking:
        one = measurement.outcomes[name]
        remark = f"{one.kernel} ({one.warm_up})" if one.warm_up else one.kernel
        lines.append(f"  {name:<20} {format_seconds(seconds):>8}  {remark}")
    timed = {name for _, name in ranking}
    lines += [f"  {name:<20} {one.reason}" for name, one in measurement.outcomes.items() if name not in timed]
    return fit("\n".join(lines))
