"""What ``auto`` takes for a request: the fastest measured backend, else the supporting backend of highest priority."""

from __future__ import annotations

from functools import lru_cache

from attnzoo.auto import cache
from attnzoo.auto.choice import Choice, by_measurement, by_priority_because, wrongs
from attnzoo.auto.environment import Environment, environment_of
from attnzoo.auto.measurements import SizeClass, key_of, mode_of, size_class
from attnzoo.errors import BackendRefusedError, Refusal
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention, Request


def choose_for(attention: Attention, probabilities: bool = False) -> Choice:
    """What ``auto`` takes for an attention: see :func:`choose`.

    Raises:
        BackendRefusedError: every backend refuses, or was measured to be wrong; the error lists all reasons.
        InvalidArgumentError: ``ATTNZOO_AUTO`` has a value that is not allowed.
    """
    request = attention.request(probabilities)
    because = by_priority_because()
    if because is not None:
        return choose(request, because=because)
    return choose(request, size_class(attention), environment_of(attention.query.device))


def choose(
    request: Request,
    size: SizeClass | None = None,
    environment: Environment | None = None,
    because: str = "no size was given",
) -> Choice:
    """What ``auto`` takes for a request. Remembered until the registry or the measurements change.

    Args:
        request: what is asked.
        size: its size class; None: select by priority, whatever was measured.
        environment: the device and versions the request runs on; required with a size.
        because: why the selection goes by priority, if no size is given.

    Raises:
        BackendRefusedError: every backend refuses, or was measured to be wrong; the error lists all reasons.
    """
    return _choose(request, size, environment, because, registry.generation, cache.generation())


@lru_cache(maxsize=4096)
def _choose(
    request: Request,
    size: SizeClass | None,
    environment: Environment | None,
    because: str,
    registry_generation: int,
    cache_generation: int,
) -> Choice:
    supporting = registry.supporting_backends(request)
    wrong: dict[str, str] = {}
    if size is not None and environment is not None:
        because = f"nothing measured for {mode_of(request.grad)} at {size}; attnzoo.tune measures"
        measurement = cache.find(environment, key_of(request, size))
        if measurement is not None:
            fastest = by_measurement(measurement, supporting)
            if fastest is not None:
                return fastest
            wrong = wrongs(measurement, supporting)
    right = [backend for backend in supporting if backend.name not in wrong]
    if right:
        alone = len(supporting) == 1
        return Choice(right[0], "the only backend that supports this" if alone else f"by priority: {because}")
    refused = {f"backend {backend.name!r}": backend.refusals(request) for backend in registry.exact_backends()}
    for name, reason in wrong.items():
        refused[f"backend {name!r}"] = (Refusal("measured", reason, "what agrees with the oracle; attnzoo tune"),)
    raise BackendRefusedError("auto", refused, {})
