"""Oracles for backends that change the pattern of an attention. Such an oracle also computes the changed pattern.

Runs in several dtypes can be compared only if all runs make the same random choices (hash buckets). The oracle
therefore repeats the random choices of one recorded run.
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
    """Oracle that changes each attention as ``backend`` does, and computes the changed attention with ``plain``.

    Call ``n`` uses item ``n`` of ``random_choices`` instead of new random choices.
    """

    __eq__ = object.__eq__  # oracles with equal fields may have replayed different numbers of calls
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
    """Return a dict from globs of site names to oracles, as :func:`attnzoo.patch` accepts.

    ``approximate`` maps a site name to the backend that changed the pattern, and the random choices of each call.
    """
    plain = EagerBackend() if plain is None else plain
    rewriting: dict[str, str | Backend] = {
        glob.escape(site): RewritingOracle(backend, iter(choices), plain)
        for site, (backend, choices) in approximate.items()
    }
    return {**rewriting, "*": plain}
