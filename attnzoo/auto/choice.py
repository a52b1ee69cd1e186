"""The rules by which ``auto`` selects a backend: by measurement or by priority."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from attnzoo.auto.environment import code_of
from attnzoo.auto.measurements import Measurement, format_seconds
from attnzoo.backend import Backend, Choice
from attnzoo.errors import InvalidArgumentError

VARIABLE = "ATTNZOO_AUTO"
BY_REQUEST = f"{VARIABLE}=priority"


def by_priority_because() -> str | None:
    """Return why ``auto`` currently selects backends by priority. None means that ``auto`` uses measurements.

    There are three reasons: ``ATTNZOO_AUTO=priority``, ``torch.compile``, and ``torch.use_deterministic_algorithms``
    (because a new measurement could change the backend and so the results). ``ATTNZOO_AUTO=measured`` switches the
    last reason off. If ``ATTNZOO_AUTO=priority`` is set when a model is patched, ``auto`` never runs the model's code.
    With the other reasons, the rule (:mod:`attnzoo.auto.rule`) decides between the model's code and a backend.

    Raises:
        InvalidArgumentError: ``ATTNZOO_AUTO`` is neither empty nor ``measured`` nor ``priority``.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "measured", "priority"):
        raise InvalidArgumentError(VARIABLE, repr(value), "'measured' or 'priority'")
    if value == "priority":
        return BY_REQUEST
    if torch.compiler.is_compiling():
        return "lengths are unknown inside torch.compile"
    if not value and torch.are_deterministic_algorithms_enabled():
        return f"torch.use_deterministic_algorithms is on and {VARIABLE}=measured is not set"
    return None


def by_measurement(measurement: Measurement, candidates: Sequence[Backend]) -> Choice | None:
    """Return the fastest measured candidate, or None if no candidate has a measured time.

    A time counts only if the candidate's code has not changed since the measurement.
    """
    current = {backend.name: backend for backend in candidates if is_current(measurement, backend)}
    ranking = [(seconds, name) for seconds, name in measurement.ranking() if name in current]
    if not ranking:
        return None
    (fastest, name), *rest = ranking
    others = "".join(f"; {other} {format_seconds(seconds)}" for seconds, other in rest)
    warm_up = measurement.outcomes[name].warm_up
    return Choice(current[name], f"measured {format_seconds(fastest)}{f' ({warm_up})' if warm_up else ''}{others}")


def wrongs(measurement: Measurement, candidates: Sequence[Backend]) -> dict[str, str]:
    """Return ``{name: reason}`` for the candidates that gave wrong results or raised in the measurement."""
    current = [backend.name for backend in candidates if is_current(measurement, backend)]
    return {name: measurement.outcomes[name].reason for name in current if measurement.outcomes[name].wrong}


def is_current(measurement: Measurement, backend: Backend) -> bool:
    """Whether the measurement has an outcome for the backend, measured with the current code of the backend."""
    outcome = measurement.outcomes.get(backend.name)
    return outcome is not None and outcome.code == code_of(type(backend))
