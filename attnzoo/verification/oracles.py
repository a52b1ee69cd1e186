"""The oracle for models whose backends change the pattern: it computes the changed attention.

Runs in several dtypes can be compared only if they make the same random choices (hash buckets). The oracle therefore
repeats the choices of one recorded run.
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
class RewritingOracle(Backend):
    """Run plain operations on each attention as another backend rewrites it, with its random choices call by call."""

    __eq__ = object.__eq__  # backends compare by options, and two oracles have the same options at different calls
    __hash__ = object.__hash__

    name: ClassVar[str] = "eager"
    capabilities: ClassVar[Capabilities] = EagerBackend.capabilities

    backend: Backend
    random_choices: Iterator[object]
    plain: Backend

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        return self.plain.run(self.backend.rewrite(attention, next(self.random_choices)), probabilities)


def oracles(
    approximate: Mapping[str, tuple[Backend, list[object]]], plain: Backend | None = None
) -> dict[str, str | Backend]:
    """Return the oracle for each site of a model, by glob over site names, to pass to :func:`attnzoo.patch`.

    ``approximate`` has, by site, the backend that may change the pattern, and its random choices call by call.
    """
    plain = EagerBackend() if plain is None else plain
    rewriting: dict[str, str | Backend] = {
        glob.escape(site): RewritingOracle(backend, iter(choices), plain)
        for site, (backend, choices) in approximate.items()
    }
    return {**rewriting, "*": plain}
