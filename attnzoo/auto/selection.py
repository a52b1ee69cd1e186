"""The backend ``auto``, which selects a backend for each attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from attnzoo.adapter import PatchPoint
from attnzoo.auto import cache
from attnzoo.auto.choice import BY_REQUEST, by_measurement, by_priority_because, wrongs
from attnzoo.auto.environment import Environment, environment_of
from attnzoo.auto.measurements import SizeClass, key_of, mode_of, size_class
from attnzoo.auto.native import NativeChooser, Preference
from attnzoo.backend import Backend, Choice
from attnzoo.errors import BackendRefusedError, Refusal
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention, Request, Result


@dataclass(frozen=True)
class AutoBackend(Backend):
    """The backend that runs each attention on the fastest measured backend. Without measurements, priority decides.

    Before that, :class:`~attnzoo.auto.native.NativeChooser` decides whether a patched module runs the model's code.
    The candidates are the available exact backends. The registry reserves the name ``auto``, but does not list it.

    Attributes:
        native: when a patched module runs the model's code instead (:data:`~attnzoo.auto.native.Preference`).
    """

    name: ClassVar[str] = "auto"
    native: Preference = "auto"

    def bind_to_site(self, site: tuple[Request, ...], patch: tuple[Request, ...]) -> Backend:
        by_priority_because()  # raises at patch time if ATTNZOO_AUTO has a value that is not allowed
        return self

    def chooser(self, point: PatchPoint) -> NativeChooser | None:
        """Return the object that decides when a module of ``point`` runs the model's code. None means never."""
        by_request = self.native == "auto" and by_priority_because() == BY_REQUEST
        never = by_request or self.native == "never" or not point.attends
        return None if never else NativeChooser(point, self.native)

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        """Return ``()`` if a candidate supports the request. Otherwise return the refusals of all candidates."""
        answers = {candidate.name: candidate.refusals(request) for candidate in registry.exact_backends()}
        return _with_names(answers) if all(answers.values()) else ()

    def select(self, attention: Attention, probabilities: bool = False) -> Choice:
        return choose_for(attention, probabilities)

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        return self.select(attention, probabilities).backend.run(attention, probabilities)


def choose_for(attention: Attention, probabilities: bool = False) -> Choice:
    """Return the backend that ``auto`` selects for an attention.

    Raises:
        BackendRefusedError: no candidate supports the request, or every candidate that supports the request gave wrong
            results in ``tune``. The message lists every reason of every candidate.
        InvalidArgumentError: ``ATTNZOO_AUTO`` has a value that is not allowed.
    """
    request = attention.request(probabilities)
    because = by_priority_because()
    if because is not None:
        return _choose(request, None, None, because, registry.generation, cache.generation())
    size, environment = size_class(attention), environment_of(attention.query.device)
    return _choose(request, size, environment, "", registry.generation, cache.generation())


@lru_cache(maxsize=4096)
def _choose(
    request: Request, size: SizeClass | None, environment: Environment | None, because: str, *generations: int
) -> Choice:
    """Select a backend for a request. If ``size`` is None, select by priority.

    ``lru_cache`` keeps the selections. If one of ``generations`` changes, earlier selections are not used again.
    """
    supporting = registry.supporting_backends(request)
    wrong: dict[str, str] = {}
    if size is not None and environment is not None:
        because = f"no measurement for {mode_of(request.grad)} at {size}; to measure, run attnzoo tune"
        measurement = cache.find(environment, key_of(request, size))
        if measurement is not None:
            fastest = by_measurement(measurement, supporting)
            if fastest is not None:
                return fastest
            wrong = wrongs(measurement, supporting)
    right = [backend for backend in supporting if backend.name not in wrong]
    if right:
        alone = len(supporting) == 1
        return Choice(right[0], "the only backend that supports this request" if alone else f"by priority: {because}")
    answers = {backend.name: backend.refusals(request) for backend in registry.exact_backends()}
    for name, reason in wrong.items():
        answers[name] = (Refusal("measured", reason, "results that agree with the oracle (attnzoo tune --again)"),)
    raise BackendRefusedError(AutoBackend.name, {"attention": _with_names(answers)}, {})


def _with_names(answers: Mapping[str, tuple[Refusal, ...]]) -> tuple[Refusal, ...]:
    pairs = ((name, reason) for name, reasons in answers.items() for reason in reasons)
    return tuple(replace(reason, field=f"backend {name!r}: {reason.field}") for name, reason in pairs)
