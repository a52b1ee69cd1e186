"""A fresh cache and registry for each test, and backends that advance a fake clock. No test reads a real clock."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo.auto import cache
from attnzoo.backends.eager import EagerBackend, evaluate
from attnzoo.registry import Registry, registry
from attnzoo.tuning import race
from attnzoo.tuning.race import MOST_RUNS

CAN_ALL = replace(EagerBackend.capabilities, probabilities=False)


class FakeClock:
    """Returns the seconds that fake backends have added."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class AdvanceInBackward(torch.autograd.Function):
    """The identity; its backward advances the clock."""

    @staticmethod
    def forward(ctx, output, clock, seconds):
        ctx.clock, ctx.seconds = clock, seconds
        return output.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.now += ctx.seconds
        return grad, None, None


@pytest.fixture
def clock(monkeypatch):
    """A fake clock. It stands still while the model's code runs, so a sample would have as many runs as are allowed."""
    monkeypatch.setattr(race, "MOST_RUNS", 2)
    return FakeClock()


@pytest.fixture
def many_runs(clock, monkeypatch):
    """Allow as many runs in a sample as without a fake clock."""
    monkeypatch.setattr(race, "MOST_RUNS", MOST_RUNS)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """An empty cache folder for each test, and no measurements in memory."""
    monkeypatch.setenv("ATTNZOO_CACHE_DIR", str(tmp_path / "cache"))
    cache.forget()
    yield
    cache.forget()


@pytest.fixture
def add(clock):
    """A function that registers a fake backend in an empty registry: ``add("fast", seconds=1.0)``."""

    def register(name, seconds=1.0, rank=0, costs=None, backward=0.0, spoils=None, raises=None, version="", **narrower):
        """Register a backend that computes as eager does; each run advances the clock by ``seconds``.

        ``costs`` gives the seconds of each run in turn, and its last number holds for all later runs. ``spoils``
        changes the output. ``version`` is part of the class name: another version is other code.
        """

        @dataclass(frozen=True)
        class Fake(attnzoo.Backend):
            runs: ClassVar[list] = []
            capabilities: ClassVar[attnzoo.Capabilities] = replace(CAN_ALL, **narrower)

            def run(self, attention, probabilities=False):
                self.runs.append(attention)
                if raises is not None:
                    raise raises
                turns = [seconds] if costs is None else costs
                clock.now += turns[min(len(self.runs), len(turns)) - 1]
                output = evaluate(attention).output
                output = AdvanceInBackward.apply(output, clock, backward) if backward else output
                return attnzoo.Result(output if spoils is None else spoils(output), f"{name}-kernel")

        Fake.name, Fake.priority, Fake.__qualname__ = name, rank, f"Fake{version}"
        return attnzoo.register_backend(Fake, replace=True)

    with registry.replaced_by(Registry(discover=False)):
        yield register
