from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from attnzoo import register_backend, unregister_backend
from attnzoo.benchmarks import weights
from attnzoo.benchmarks.measure import machine
from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.rows import Row, Shootout
from attnzoo.benchmarks.runner import Plan, run
from attnzoo.benchmarks.worker import LocalWorker
from tests.support import fake_shootout


@pytest.fixture(autouse=True, scope="package")
def frozen() -> Iterator[None]:
    """What is loaded already needs no collecting before every single run."""
    fake_shootout.TINY.build()
    machine("cpu")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiny family and the fake backends, for the time of a test."""
    monkeypatch.setitem(WORKLOADS, "tiny", fake_shootout.TINY)
    monkeypatch.setattr(weights, "_POOL", 65537)  # enough for tiny models
    fake_shootout.Switch.calls = 0
    threads = torch.get_num_threads()
    for cls in fake_shootout.BACKENDS:
        register_backend(cls)
    yield
    for cls in fake_shootout.BACKENDS:
        unregister_backend(cls.name)
    torch.set_num_threads(threads)


@pytest.fixture
def shootout() -> Callable[..., Shootout]:
    """Runs a plan for the tiny family in this process, the end-to-end gate green unless given."""

    def go(*backends: str, check: Any = lambda job: (True, ""), **values: Any) -> Shootout:
        values = {"seq_lens": (40,), "rounds": 1, "modes": (False,), **values}
        plan = Plan(families=("tiny",), backends=backends or None, **values)
        return run(plan, launch=LocalWorker, check=check)

    return go


def row_of(found: Shootout, backend: str, mode: str = "forward") -> Row:
    (row,) = [row for row in found.rows if row.backend == backend and row.mode == mode]
    return row
