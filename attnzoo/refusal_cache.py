"""The refusals of each backend for each request on this machine, computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnzoo.backend import Backend
from attnzoo.errors import Refusal, raise_interrupts

if TYPE_CHECKING:
    from attnzoo.spec.segments import Request

_MOST_ENTRIES = 4096  # without this limit, requests with new offsets would fill the memory


class RefusalCache:
    """A cache of refusals by backend and request. Threads may share a cache, because each step replaces one entry."""

    def __init__(self) -> None:
        self._refusals: dict[tuple[Backend, Request], tuple[Refusal, ...]] = {}
        self._same_objects: dict[tuple[int, int], tuple[Backend, Request, tuple[Refusal, ...]]] = {}

    def clear(self) -> None:
        """Remove all entries."""
        self._refusals.clear()
        self._same_objects.clear()

    def get(self, backend: Backend, request: Request) -> tuple[Refusal, ...]:
        """Return why a backend cannot run a request on this machine."""
        # Layers ask with the same objects in every call, and hashing a request takes longer than the rest of the check.
        # An entry keeps its objects, so no later object can have the same id.
        ids = (id(backend), id(request))
        same = self._same_objects.get(ids)
        if same is not None:
            return same[2]
        key = (backend, request)
        known = self._refusals.get(key)
        if known is None:
            if len(self._refusals) >= _MOST_ENTRIES:
                self._refusals.clear()
            known = self._refusals[key] = (*availability(backend), *backend.refusals(request))
        if len(self._same_objects) >= _MOST_ENTRIES:
            self._same_objects.clear()
        self._same_objects[ids] = (backend, request, known)
        return known


def availability(backend: Backend) -> tuple[Refusal, ...]:
    """Return why a backend cannot run on this machine. An empty tuple means that there is no reason."""
    reason = unavailable_reason(type(backend))
    return () if reason is None else (Refusal("availability", reason, "a machine on which the backend can run"),)


def unavailable_reason(cls: type[Backend]) -> str | None:
    """Return why a backend cannot run on this machine, or None. If the check raises, the exception is the reason."""
    try:
        return cls.unavailable()
    except BaseException as error:
        raise_interrupts(error)
        return f"availability check failed: {type(error).__name__}: {error}"
