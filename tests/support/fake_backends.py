"""Backends for tests that compute what ``eager`` computes, record their runs, and declare fewer capabilities."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import attnzoo
from attnzoo.backends.eager import EagerBackend


def fake_backend(name="fake", aliases=(), priority=-1000, why_not=None, **narrower):
    """Return a backend class; ``narrower`` replaces capabilities of eager, and ``why_not`` makes it unavailable."""

    @dataclass(frozen=True)
    class Fake(attnzoo.Backend):
        runs: ClassVar[list] = []
        capabilities: ClassVar[attnzoo.Capabilities] = replace(EagerBackend.capabilities, **narrower)

        @classmethod
        def unavailable(cls):
            return why_not

        def run(self, attention, probabilities=False):
            self.runs.append(attention)
            return EagerBackend().run(attention, probabilities)._replace(kernel=f"{self.name}-kernel")

    Fake.name, Fake.aliases, Fake.priority = name, aliases, priority
    return Fake


def small_inputs(**changes):
    """Return arguments of :func:`attnzoo.attention`."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    return {**dict(q=q, k=k, v=v), **changes}
