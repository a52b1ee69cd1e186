from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from attnzoo import register_backend
from attnzoo.benchmarks import weights
from attnzoo.benchmarks.cases import Case
from attnzoo.benchmarks.contenders import Contender
from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.rows import Row, Shootout
from attnzoo.benchmarks.runner import ShootoutPlan, run
from attnzoo.benchmarks.tables import show
from attnzoo.benchmarks.worker import Worker
from attnzoo.cli.bench import bench
from attnzoo.registry import registry
from tests.support import fake_shootout

MODES = (False, True)


def launch(contender: Contender, case: Case) -> Worker:
    """Return a worker in this process. As in a worker process, garbage collections ignore what exists before."""
    gc.freeze()
    return Worker(contender, case)


@contextmanager
def planted() -> Iterator[None]:
    """Register the tiny family and the planted backends inside the context."""
    threads = torch.get_num_threads()
    with registry.replaced_by(registry.copy()), pytest.MonkeyPatch.context() as patched:
        patched.setitem(WORKLOADS, "tiny", fake_shootout.TINY)
        patched.setattr(weights, "_POOL", 65537)  # enough for tiny models
        fake_shootout.Switch.calls = 0
        for cls in fake_shootout.BACKENDS:
            register_backend(cls)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    with planted():
        yield


def run_plan(*backends: str, check: Any = lambda job: (True, ""), **fields: Any) -> Shootout:
    """Run a plan for the tiny family in this process; by default every end-to-end gate is green."""
    fields = {"families": ("tiny",), "seq_lens": (40,), "rounds": 1, "modes": (False,), **fields}
    return run(ShootoutPlan(backends=backends or None, **fields), launch=launch, check=check)


@pytest.fixture
def shootout() -> Callable[..., Shootout]:
    return run_plan


@pytest.fixture(scope="package")
def plain() -> Shootout:
    """A shootout of the original and ``sdpa`` that ran once, for tests that only read it."""
    with planted():
        return run_plan("sdpa")


def invoke_bench(*arguments: str) -> Any:
    """Run ``attnzoo bench`` in this process."""
    app = typer.Typer()
    app.command()(bench)
    return CliRunner().invoke(app, arguments)


def row_of(result: Shootout, backend: str, mode: str = "forward") -> Row:
    (row,) = [row for row in result.rows if row.backend == backend and row.mode == mode]
    return row


def assert_no_measurements(row: Row) -> None:
    assert row.seconds is None and row.fastest is None and row.slowest is None and row.speedup is None
    assert row.runs == () and row.peak_bytes is None and row.peak_ratio is None


def assert_red(result: Shootout, backend: str, *words: str) -> None:
    """Assert that a backend has a red row with these words in its reason and without measurements."""
    row = row_of(result, backend)
    assert row.status == "red" and all(word in row.reason for word in words), row.reason
    assert_no_measurements(row)


def printed(result: Shootout, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width)
    show(result, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def line_of(text: str, backend: str) -> list[str]:
    """Return the words of the table line that starts with a name."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [backend])
