"""Measure each row in a separate process, which builds the contender, checks its numbers, and times its runs.

The processes of a case take turns. The parent sends one request at a time, so only one process computes.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

import torch

import attnzoo
from attnzoo.benchmarks.cases import DTYPES, Case, Projections, backend_of
from attnzoo.benchmarks.contenders import Contender, Execution, GateVerdict
from attnzoo.benchmarks.measure import Peak, peak_of, seconds
from attnzoo.benchmarks.models import find_workload
from attnzoo.benchmarks.rows import FAILED, REFUSED, Problem
from attnzoo.errors import BackendRefusedError

Served = TypeVar("Served")
Answer = TypeVar("Answer")


class Worker:
    """Worker that measures one contender in one case, in the calling process."""

    def __init__(self, contender: Contender, case: Case) -> None:
        self._contender, self._case = contender, case
        self._projections: Projections | None = None

    def setup(self) -> tuple[Peak, float]:
        """Build the subject and run it once, as a warm-up. Return the peak memory and the seconds of this run."""
        torch.set_num_threads(self._case.threads)
        self._prepared = self._contender.prepare(self._case)
        subject, device = self._prepared.subject, self._case.device
        durations: list[float] = []
        peak = peak_of(lambda: durations.append(seconds(subject.step, device)), device)
        subject.clear()
        if self._case.scope == "attention":
            self._projections = Projections(subject)
        return peak, durations[0]

    def gate(self) -> GateVerdict:
        return self._prepared.gate()

    def time(self) -> float:
        """Return the seconds of one run. In scope ``attention``, subtract the seconds of the projections."""
        subject = self._prepared.subject
        duration = subject.seconds()
        subject.clear()
        return duration if self._projections is None else duration - self._projections.seconds()

    def execution(self) -> Execution:
        return self._prepared.execution()

    def close(self) -> None:
        self.__dict__.clear()


@dataclass(frozen=True)
class EndToEndJob:
    """One run of :func:`attnzoo.verify` on a one-layer model that otherwise has the published configuration."""

    family: str
    backend: str
    seq_len: int
    dtype: str
    device: str
    threads: int
    gradients: bool


def verify_here(job: EndToEndJob) -> tuple[bool, str]:
    """Return whether the backend passes ``verify``, and the report. The input must be short: the oracle is dense."""
    torch.set_num_threads(job.threads)
    workload = find_workload(job.family)
    model = workload.build(layers=1).to(job.device, DTYPES[job.dtype])
    inputs = workload.read(1, job.seq_len, job.device).kwargs
    report = attnzoo.verify(model, inputs, backend=backend_of(job.backend), gradients=job.gradients)
    return report.ok, str(report)


def process_context(preload: Iterable[str]) -> BaseContext:
    """Return the context that starts workers: if possible, a fork server that imports ``preload``, else ``spawn``."""
    # The profiler of torch 2.13 logs to stderr unless this level is set before torch is imported. The setting affects
    # the worker processes only, because this process has already imported torch.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "attnzoo", __name__, *preload])
    return context


class Remote(Generic[Served]):
    """An object in a fresh process. The process runs one method of the object at a time."""

    def __init__(self, context: BaseContext, served: Served) -> None:
        self._connection, theirs = context.Pipe()
        self._process: Any = context.Process(target=_serve, args=(theirs, served), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()

    def call(self, method: Callable[[Served], Answer]) -> Answer:
        """Run ``method`` on the object in the process, and return the result.

        Raises:
            Problem: the method raised an exception, or the process died.
        """
        try:
            self._connection.send(method)
            answer: Any = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            hint = "; killed, probably out of memory" if code == -9 else ""
            raise Problem(FAILED, f"the worker process ended with exit code {code}{hint}") from None
        if isinstance(answer, Problem):
            raise answer
        return answer

    def close(self) -> None:
        """Tell the process to end, and terminate the process if it still runs after 10 seconds.

        An immediate termination could leave semaphores behind, such as a semaphore of tqdm after a compilation. Then
        multiprocessing would print a warning about each semaphore.
        """
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, served: object) -> None:
    gc.freeze()  # so that garbage collection before every timed run ignores all imported modules
    while True:
        try:
            method = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = method(served)
        except KeyboardInterrupt:
            return
        except Exception as error:
            answer = as_problem(error)
        connection.send(answer)


def as_problem(error: Exception) -> Problem:
    """Return an exception as a :class:`Problem` with a status and a reason."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, BackendRefusedError):
        reasons = dict.fromkeys(str(reason) for reasons in error.refusals.values() for reason in reasons)
        return Problem(REFUSED, "; ".join(reasons))
    return Problem(FAILED, f"{type(error).__name__}: {error}")


class ProcessWorker(Worker):
    """A :class:`Worker` in a fresh process."""

    def __init__(self, context: BaseContext, contender: Contender, case: Case) -> None:
        self._remote = Remote(context, Worker(contender, case))

    def setup(self) -> tuple[Peak, float]:
        return self._remote.call(Worker.setup)

    def gate(self) -> GateVerdict:
        return self._remote.call(Worker.gate)

    def time(self) -> float:
        return self._remote.call(Worker.time)

    def execution(self) -> Execution:
        return self._remote.call(Worker.execution)

    def close(self) -> None:
        self._remote.close()


def verify_in_process(context: BaseContext, job: EndToEndJob) -> tuple[bool, str]:
    """Run :func:`verify_here` in a fresh process."""
    with closing(Remote(context, job)) as remote:
        return remote.call(verify_here)
