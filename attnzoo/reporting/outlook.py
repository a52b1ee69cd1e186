"""Predict what ``auto`` will select at a site. The prediction uses stored measurements, the rule and priorities."""

from __future__ import annotations

from attnzoo.adapter import parameter_of
from attnzoo.auto import cache
from attnzoo.auto.choice import BY_REQUEST, by_measurement, by_priority_because
from attnzoo.auto.environment import environment_of
from attnzoo.auto.measurements import Measurement, to_plain_data
from attnzoo.auto.modules import by_measurement as decide_by_measurement
from attnzoo.auto.modules import is_of_module, is_similar
from attnzoo.auto.rule import native_by_rule
from attnzoo.patching.plan import SitePlan
from attnzoo.registry import registry
from attnzoo.spec.segments import Request

_COMPARED = ("device", "dtype", "heads", "head_dim", "value_dim")


def outlook(plan: SitePlan) -> tuple[str, ...]:
    """Return when ``auto`` runs the model's code at a site, and which backend it selects otherwise."""
    native = _native(plan)
    *measured, rest = _backends(plan)
    return (*native, *measured, f"otherwise {rest}" if native and not measured else rest)


def _native(plan: SitePlan) -> tuple[str, ...]:
    """Return a line per measurement of a similar module, and a line with the rule for all other calls."""
    point, module = plan.target.point, plan.target.module
    because, fault = by_priority_because(), point.fault(module)
    if fault is not None:
        return (f"never native: {fault}",)
    if because == BY_REQUEST:
        return ()
    device = parameter_of(module).device
    lines = []
    known = cache.known(environment_of(device)).values() if because is None and plan.requests else ()
    for measurement in known:
        if is_of_module(measurement) and is_similar(measurement, point, module):
            decision = decide_by_measurement(measurement, type(module))
            if decision is not None:
                runs = "native" if decision.native else "a backend"
                lines.append(f"{runs} for {measurement.mode} at {measurement.size}: {decision.reason}")
    rule = native_by_rule(plan.requests, point.original_kernel(module), device.type, point.dropout(module) > 0.0)
    return (*lines, f"the model's own code by rule{' elsewhere' if lines else ''}, {rule}")


def _backends(plan: SitePlan) -> tuple[str, ...]:
    """Return a line per similar measured attention, and a line for other attentions.

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
