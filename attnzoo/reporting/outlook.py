"""Predict what ``auto`` will select at a site. The prediction uses stored measurements and priorities."""

from __future__ import annotations

from attnzoo.adapter import parameter_of
from attnzoo.auto import cache
from attnzoo.auto.choice import by_measurement, by_priority_because
from attnzoo.auto.environment import environment_of
from attnzoo.auto.measurements import Measurement, to_plain_data
from attnzoo.patching.plan import SitePlan
from attnzoo.registry import registry
from attnzoo.spec.segments import Request

_COMPARED = ("device", "dtype", "heads", "head_dim", "value_dim")


def outlook(plan: SitePlan) -> tuple[str, ...]:
    """Return what ``auto`` selects at a site: a line per similar measured attention, and a line for other attentions.

    A measured attention is similar if device, dtype, number and size of heads, and the pattern of the first segment are
    the same as at the site. Masks, gradients and lengths are ignored, because they are unknown before a run.
    """
    because = by_priority_because()
    lines = []
    if because is None:
        known = cache.known(environment_of(parameter_of(plan.target.module).device)).values()
        for measurement in known:
            if any(_is_similar(measurement, request) for request in plan.requests):
                choice = by_measurement(measurement, registry.exact_backends())
                if choice is not None:
                    where = f"{measurement.mode} at {measurement.size}"
                    lines.append(f"{choice.backend.name} for {where}: {choice.reason}")
    best = (next(iter(registry.supporting_backends(request)), None) for request in plan.requests)
    names = ", ".join(dict.fromkeys("nothing" if backend is None else backend.name for backend in best)) or "as asked"
    if lines:
        return (*lines, f"{names} for other sizes, by priority")
    return (f"{names} by priority: {because or 'nothing measured yet, see attnzoo tune'}",)


def _is_similar(measurement: Measurement, request: Request) -> bool:
    expected, measured = to_plain_data(request), measurement.request
    same = all(measured.get(name) == expected[name] for name in _COMPARED)
    segments = measured.get("segments") or [{}]
    return same and segments[0].get("pattern") == expected["segments"][0]["pattern"]
