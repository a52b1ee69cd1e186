"""The result of ``tune``, and a function that formats measurements as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnzoo.auto.measurements import Measurement, format_seconds
from attnzoo.layout import fit


class TuningReport(tuple[Measurement, ...]):
    """The measurements of :func:`attnzoo.tune`, one per request and size class. The report prints as tables.

    Attributes:
        fresh: keys of the measurements that are new. The remaining measurements were already in the cache.
        modules: the measurements of whole modules, with the model's code (``native``) and with backends (``auto``).
    """

    fresh: frozenset[str]
    modules: tuple[Measurement, ...]

    def __new__(
        cls,
        measurements: Iterable[Measurement],
        fresh: frozenset[str] = frozenset(),
        modules: tuple[Measurement, ...] = (),
    ) -> TuningReport:
        report = super().__new__(cls, measurements)
        report.fresh, report.modules = fresh, modules
        return report

    def to_dict(self) -> list[dict[str, Any]]:
        """Return plain data for JSON: the attentions, then the modules. ``scope`` distinguishes them."""
        scopes = [(measurement, "attention") for measurement in self]
        scopes += [(measurement, "module") for measurement in self.modules]
        return [{**m.to_dict(), "scope": scope, "fresh": m.key in self.fresh} for m, scope in scopes]

    def __str__(self) -> str:
        if not self and not self.modules:
            return "nothing to measure: only one backend, or only the model's code, can compute each attention"
        tables = (table(m, "" if m.key in self.fresh else " (already stored)") for m in (*self, *self.modules))
        return "\n".join(tables)


def table(measurement: Measurement, remark: str = "") -> str:
    """Return a table of the timed backends, fastest first, and of the reasons why other backends were not timed."""
    request = measurement.request
    head = f"{measurement.where}: {request.get('dtype')}, {request.get('heads')} heads x {request.get('head_dim')}, "
    lines = [f"{head}{measurement.size}, {measurement.mode}{remark}"]
    ranking = measurement.ranking()
    for seconds, name in ranking:
        outcome = measurement.outcomes[name]
        remark = f"{outcome.kernel} ({outcome.warm_up})" if outcome.warm_up else outcome.kernel
        lines.append(f"  {name:<20} {format_seconds(seconds):>8}  {remark}")
    timed = {name for _, name in ranking}
    untimed = {name: outcome for name, outcome in measurement.outcomes.items() if name not in timed}
    lines += [f"  {name:<20} {outcome.reason}" for name, outcome in untimed.items()]
    return fit("\n".join(lines))
