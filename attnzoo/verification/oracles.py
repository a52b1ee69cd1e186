"""The oracle where a backend changes what is computed: it computes what that backend makes of an attention.

Runs in several dtypes are compared only if they make the same choices (hash buckets), so those of one run are repeated.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from attnzoo.backend import Backend, Capabilities
from attnzoo.backends.eager import EagerBackend
from attnzoo.spec.segments import Attention, Result


@dataclass(frozen=True, eq=False)
class Rewritten(Backend):
    """Plain operations on what another backend makes of each attention.

    Attributes:
        backend: the other.
        repeated: its choices, call by call.
        plain: the plain operations.
    """

    __eq__ = object.__eq__  # two of them are not one because they have as little to tell as any backend
    __hash__ = object.__hash__

    name: ClassVar[str] = "eager"
    capabilities: ClassVar[Capabilities] = EagerBackend.capabilities

    backend: Backend
    repeated: Iterator[object]
    plain: Backend

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        return self.plain.run(self.backend.rewrite(attention, next(self.repeated)), probabilities)


def oracles(
    rewriters: Mapping[str, tuple[Backend, list[object]]], plain: Backend | None = None
) -> dict[str, str | Backend]:
    """What to patch a model with for it to compute by definition, by glob over site names.

    Args:
        rewriters: by site, the backend that may have changed the pattern there, and its choices call by call.
        plain: the plain operations to compute with; None: ``eager``.
    """
    plain = EagerBackend() if plain is None else plain
    found: dict[str, str | Backend] = {
        glob.escape(site): Rewritten(backend, iter(choices), plain) for site, (backend, choices) in rewriters.items()
    }
    return {**found, "*": plain}
