"""What ``auto`` will take at a site, as far as it is known before anything runs: for people."""

from __future__ import annotations

from attnzoo.adapter import parameter_of
from attnzoo.auto import cache, selection
from attnzoo.auto.choice import by_measurement, by_priority_because
from attnzoo.auto.environment import environment_of
from attnzoo.auto.measurements import Measurement, to_plain_data
from attnzoo.errors import BackendRefusedError
from attnzoo.patching.sites import PatchTarget, expected_requests
from attnzoo.registry import registry
from attnzoo.spec.segments import Request

_ALIKE = ("device", "dtype", "heads", "head_dim", "value_dim")


def auto_at(site: PatchTarget) -> tuple[str, ...]:
    """One line per size class that was measured for attentions like the site's, and one for all others.

    Which masks, gradients and lengths will be asked for is not known before a run; like means the same device, dtype,
    heads and first pattern.
    """
    requests = expected_requests(site)
    because = by_priority_because()
    lines = []
    if because is None:
        known = cache.known(environment_of(parameter_of(site.module).device)).values()
        for measurement in known:
            if any(_alike(measurement, request) for request in requests):
                choice = by_measurement(measurement, registry.exact_backends())
                if choice is not None:
                    where = f"{measurement.mode} at {measurement.size}"
                    lines.append(f"{choice.backend.name} for {where}: {choice.reason}")
    first = ", ".join(dict.fromkeys(map(_by_priority, requests))) or "as asked"
    if lines:
        return (*lines, f"{first} for other sizes, by priority")
    return (f"{first} by priority: {because or 'nothing measured yet, see attnzoo tune'}",)


def _by_priority(request: Request) -> str:
    try:
        return selection.choose(request).backend.name
    except BackendRefusedError:
        return "nothing"


def _alike(measurement: Measurement, request: Request) -> bool:
    told, measured = to_plain_data(request), measurement.request
    same = all(measured.get(name) == told[name] for name in _ALIKE)
    segments = measured.get("segments") or [{}]
    return same and segments[0].get("pattern") == told["segments"][0]["pattern"]
