"""One process per row: built, measured and judged alone, then timed in turns with the others.

The parent drives a worker by one request at a time, so that only one process computes at any moment.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

from attnzoo.benchmarks.cases import Case, Projections
from attnzoo.benchmarks.contenders import Contender, Executed, Gate, end_to_end
from attnzoo.benchmarks.measure import Peak, peak_of, seconds
from attnzoo.errors import BackendRefusedError


class Problem(Exception):
    """A row that cannot be measured.

    Attributes:
        status: ``"refused"`` (the backend says no, with reasons) or ``"failed"`` (anything else).
        reason: in words.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class Setup(NamedTuple):
    """What the first run told: its peak memory, and how long it took (a warm-up, not a result)."""

    peak: Peak
    seconds: float


@dataclass(frozen=True)
class Verify:
    """An end-to-end check to run in a process of its own instead of a case."""

    family: str
    backend: str
    seq_len: int
    dtype: str
    device: str
    threads: int
    gradients: bool


class Worker(Protocol):
    """Drives one contender in one case; :class:`Problem` is raised when it cannot go on."""

    def setup(self) -> Setup:
        """Build, then measure the peak memory of the first run."""

    def gate(self) -> Gate:
        """Judge correctness."""

    def time(self) -> float:
        """Seconds of one run."""

    def executed(self) -> Executed:
        """What ran."""

    def close(self) -> None:
        """Let go of the process and its memory."""


class LocalWorker:
    """The work itself, in the process it is called in."""

    def __init__(self, contender: Contender, case: Case) -> None:
        self._contender, self._case = contender, case
        self._projections: Projections | None = None

    def setup(self) -> Setup:
        """Build, then measure the peak memory of the first run."""
        _use_threads(self._case.threads)
        self._entry = self._contender.prepare(self._case)
        subject, device = self._entry.subject, self._case.device
        took: list[float] = []
        peak = peak_of(lambda: took.append(seconds(subject.step, device)), device)
        subject.clear()
        if self._case.scope == "attention":
            self._projections = Projections(subject)
        return Setup(peak, took[0])

    def gate(self) -> Gate:
        """Judge correctness."""
        return self._entry.gate()

    def time(self) -> float:
        """Seconds of one run."""
        subject, device = self._entry.subject, self._case.device
        took = seconds(subject.step, device)
        subject.clear()
        if self._projections is not None:
            took -= seconds(self._projections.step, device)
            self._projections.clear()
        return took

    def executed(self) -> Executed:
        """What ran."""
        return self._entry.executed()

    def close(self) -> None:
        """Let go of everything."""
        self.__dict__.clear()


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def context(preload: Iterable[str]) -> multiprocessing.context.BaseContext:
    """How worker processes start: forked from a server that has the heavy imports done, else spawned."""
    # PyTorch's profiler, the witness of a row, logs its start and stop one level above its errors (torch 2.13), and
    # reads the level while it loads: this silences the processes that start from here, not this one.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["torch", "attnzoo", __name__, *preload])
    return made


def _end(process: Any) -> None:
    """Wait for a process that has nothing left to do.

    One that is terminated at once leaves semaphores behind (those of tqdm's lock, which compiling makes), of which
    multiprocessing warns at the very end.
    """
    process.join(10)
    if process.is_alive():
        process.terminate()
        process.join()


class ProcessWorker:
    """A :class:`LocalWorker` in a fresh process."""

    def __init__(self, made: multiprocessing.context.BaseContext, contender: Contender, case: Case) -> None:
        self._connection, theirs = made.Pipe()
        self._process: Any = made.Process(target=_serve, args=(theirs, contender, case), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()

    def _ask(self, request: str) -> Any:
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            hint = "; killed, probably out of memory" if code == -9 else ""
            raise Problem("failed", f"the worker process ended with exit code {code}{hint}") from None
        if isinstance(answer, Problem):
            raise answer
        return answer

    def setup(self) -> Setup:
        """Build, then measure the peak memory of the first run."""
        found: Setup = self._ask("setup")
        return found

    def gate(self) -> Gate:
        """Judge correctness."""
        found: Gate = self._ask("gate")
        return found

    def time(self) -> float:
        """Seconds of one run."""
        return float(self._ask("time"))

    def executed(self) -> Executed:
        """What ran."""
        found: Executed = self._ask("executed")
        return found

    def close(self) -> None:
        """Let go of everything."""
        self._connection.close()
        _end(self._process)


def _serve(connection: Connection, contender: Contender, case: Case) -> None:
    gc.freeze()  # what was imported before the fork needs no collecting before every run
    worker = LocalWorker(contender, case)
    while True:
        try:
            request = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = getattr(worker, request)()
        except KeyboardInterrupt:
            return
        except Exception as error:
            answer = as_problem(error)
        connection.send(answer)


def as_problem(error: Exception) -> Problem:
    """An exception as a row's status and reason."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, BackendRefusedError):
        reasons = dict.fromkeys(str(reason) for reasons in error.refusals.values() for reason in reasons)
        return Problem("refused", "; ".join(reasons))
    return Problem("failed", f"{type(error).__name__}: {error}")


def verify_here(job: Verify) -> tuple[bool, str]:
    """Run an end-to-end check: verdict and report.

    Raises:
        Problem: it could not be run.
    """
    _use_threads(job.threads)
    try:
        return end_to_end(job.family, job.backend, job.seq_len, job.dtype, job.device, job.gradients)
    except Exception as error:
        raise as_problem(error) from error


def _serve_verify(connection: Connection, job: Verify) -> None:
    try:
        answer: Any = verify_here(job)
    except Problem as problem:
        answer = problem
    connection.send(answer)


def verify_in_process(made: multiprocessing.context.BaseContext, job: Verify) -> tuple[bool, str]:
    """:func:`verify_here` in a fresh process."""
    ours, theirs = made.Pipe()
    process: Any = made.Process(target=_serve_verify, args=(theirs, job), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join(5)
        answer = Problem("failed", f"the end-to-end check's process ended with exit code {process.exitcode}")
    finally:
        ours.close()
        _end(process)
    if isinstance(answer, Problem):
        raise answer
    ok, text = answer
    return ok, text
