"""What ``auto`` took, and why; and whether it may go by what was measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnzoo.auto.environment import code_of
from attnzoo.auto.measurements import Measurement, format_seconds
from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError

VARIABLE = "ATTNZOO_AUTO"


@dataclass(frozen=True)
class Choice:
    """What ``auto`` takes.

    Attributes:
        backend: the backend, configured.
        reason: why it and no other, in words.
    """

    backend: Backend
    reason: str

    def __str__(self) -> str:
        return f"{self.backend.name}: {self.reason}"


def by_priority_because() -> str | None:
    """Why ``auto`` goes by priority now, whatever was measured; None: it goes by what was measured.

    ``ATTNZOO_AUTO=priority`` says so, and so does ``torch.use_deterministic_algorithms`` unless
    ``ATTNZOO_AUTO=measured`` says otherwise: which backend is fastest may differ from one measuring to the next.

    Raises:
        InvalidArgumentError: the variable has another value.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "measured", "priority"):
        raise InvalidArgumentError(VARIABLE, repr(asked), "'measured' or 'priority'")
    if asked == "priority":
        return f"{VARIABLE}=priority"
    if torch.compiler.is_compiling():
        return "lengths are unknown inside torch.compile"
    if not asked and torch.are_deterministic_algorithms_enabled():
        return f"torch.use_deterministic_algorithms is on and {VARIABLE}=measured is not set"
    return None


def by_measurement(measurement: Measurement, candidates: Sequence[Backend]) -> Choice | None:
    """The fastest of the candidates that were measured; None if none of them was.

    A candidate counts only if it is the code that was measured, not another of its name.
    """
    made = {backend.name: backend for backend in candidates if is_current(measurement, backend)}
    ranking = [(seconds, name) for seconds, name in measurement.ranking() if name in made]
    if not ranking:
        return None
    (fastest, name), *rest = ranking
    others = "".join(f"; {other} {format_seconds(seconds)}" for seconds, other in rest)
    warm_up = measurement.outcomes[name].warm_up
    return Choice(made[name], f"measured {format_seconds(fastest)}{f' ({warm_up})' if warm_up else ''}{others}")


def wrongs(measurement: Measurement, candidates: Sequence[Backend]) -> dict[str, str]:
    """Which candidates were found to be wrong or to raise, by name, and what was found."""
    found = {
        backend.name: measurement.outcomes[backend.name] for backend in candidates if is_current(measurement, backend)
    }
    return {name: outcome.reason for name, outcome in found.items() if outcome.wrong}


def is_current(measurement: Measurement, backend: Backend) -> bool:
    """Whether the backend is the very code that was measured, not another of its name."""
    outcome = measurement.outcomes.get(backend.name)
    return outcome is not None and outcome.code == code_of(type(backend))
