"""Measurements of whole attention modules: the model's code against the fastest backends.

A module measurement is a :class:`~attnzoo.auto.measurements.Measurement` whose request also names the module and the
mode, and whose outcomes are ``native`` (the model's code) and ``auto`` (the selected backends). The cache stores both
kinds of measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from attnzoo.adapter import PatchPoint
from attnzoo.auto.calls import ModuleCall, drops_weights
from attnzoo.auto.environment import code_of
from attnzoo.auto.measurements import Measurement, Outcome, format_seconds, to_plain_data
from attnzoo.backend import Backend
from attnzoo.originals.fingerprint import path_of
from attnzoo.registry import registry
from attnzoo.spec.autocast import active_autocast

NATIVE, PATCHED = "native", "auto"
# Backends run only if they need at most this share of the time of the model's code. A smaller gain may be noise.
MARGIN = 0.97
_SEPARATOR = "; "


def request_of(point: PatchPoint, module: Any, call: ModuleCall) -> dict[str, Any]:
    """Return the request of a module measurement as plain data: everything that affects time, except sizes."""
    first = to_plain_data(point.requests(module)[0])
    return {
        **first,
        "module": path_of(type(module)),
        "pattern": point.describe(module),
        "original": point.original_kernel(module),
        "mode": call.mode,
        "dropout": drops_weights(point, module),
        "autocast": to_plain_data(active_autocast(call.device)),
    }


def is_of_module(measurement: Measurement) -> bool:
    """Whether a measurement is of a whole module, not of one attention."""
    return "module" in measurement.request


def is_similar(measurement: Measurement, point: PatchPoint, module: Any) -> bool:
    """Whether a module measurement is of modules like ``module``, in any mode and size, with or without dropout."""
    ignored = ("mode", "dropout", "autocast")
    call = ModuleCall(measurement.mode, 1, 1, 1, str(measurement.request.get("device")))
    expected = request_of(point, module, call)
    return all(measurement.request.get(name) == value for name, value in expected.items() if name not in ignored)


def codes_of(backends: Iterable[Backend]) -> str:
    """Return text that identifies the code of the backends that ran in a patched module."""
    return _SEPARATOR.join(sorted({code_of(type(backend)) for backend in backends}))


class Decision(NamedTuple):
    """The decision between the model's code (``native`` is True) and the backends, with the reason."""

    native: bool
    reason: str


def by_measurement(measurement: Measurement, module_class: type) -> Decision | None:
    """Return the decision from a module measurement, or None if the code has changed or no time was measured."""
    native, patched = measurement.outcomes.get(NATIVE), measurement.outcomes.get(PATCHED)
    if native is None or patched is None or not is_current(measurement, module_class):
        return None
    if native.seconds is None and patched.seconds is None:
        return None
    # A contender without a time ran out of memory or failed the error rule.
    times = [math.inf if outcome.seconds is None else outcome.seconds for outcome in (native, patched)]
    reason = f"measured in the module: native {_text(native)}; {patched.kernel or 'patched'} {_text(patched)}"
    return Decision(times[1] > MARGIN * times[0], reason)


def is_current(measurement: Measurement, module_class: type) -> bool:
    """Whether the model's code and the code of the backends are unchanged since the measurement."""
    native, patched = measurement.outcomes[NATIVE], measurement.outcomes[PATCHED]
    known = {code_of(type(backend)) for backend in registry.exact_backends()}
    return native.code == code_of(module_class) and set(filter(None, patched.code.split(_SEPARATOR))) <= known


def _text(outcome: Outcome) -> str:
    return outcome.reason if outcome.seconds is None else format_seconds(outcome.seconds)
