"""Time several backends on one attention. Backends that fail the error rule are not timed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from attnzoo.auto.environment import code_of
from attnzoo.auto.measurements import Outcome
from attnzoo.backend import Backend
from attnzoo.conformance.attention_check import check_attention
from attnzoo.functional import execute
from attnzoo.spec.segments import Attention

Clock = Callable[[], float]
# A function from a number of runs to a context manager, which yields one function per run. It may prepare fewer runs.
Preparation = Callable[[int], AbstractContextManager[Sequence[Callable[[], object]]]]

ROUNDS = 7
# A sample repeats a run for about SAMPLE_SECONDS, at most MOST_RUNS times. A single run would mainly measure overhead.
SAMPLE_SECONDS, MOST_RUNS = 0.005, 50
# A backend that needs more than this many times the fastest backend's time in the first round is not timed again.
HOPELESS = 3.0
# A dense backend is not timed if its scores need more than this many bytes.
DENSE_BYTES = 2 << 30
# How many score tensors (batch, heads, q_len, kv_len) plain operations hold at once, and how many more for backward.
GRIDS, GRIDS_KEPT = 6, 4
ROWS = 64  # queries that the error rule checks


def race(
    attention: Attention, backends: Sequence[Backend], *, grad: bool, rounds: int = ROUNDS, clock: Clock | None = None
) -> dict[str, Outcome]:
    """Time each backend on ``attention``, and return the :class:`Outcome` of each backend by its name.

    The backends run alternately. A time is the median of ``rounds`` samples, without warm-up. With ``grad``, a time
    includes the backward, and the tensors of ``attention`` must be leaves. A backend is marked as wrong and not timed
    if it raises, or if sampled queries fail the error rule. A backend that runs out of memory is not timed, but is not
    marked as wrong.
    """
    tick = time.perf_counter if clock is None else clock
    outcomes: dict[str, Outcome] = {}
    runs: dict[str, Preparation] = {}
    for backend in backends:
        code = code_of(type(backend))
        need = dense_bytes(attention, grad)
        if backend.dense and need > DENSE_BYTES:
            reason = f"needs about {need / (1 << 30):.1f} GiB for dense scores; the limit is {DENSE_BYTES >> 30} GiB"
            outcomes[backend.name] = Outcome(code, reason=reason)
            continue
        step, kernel, first, out_of_memory = _step(backend, attention, grad), "", 0.0, False
        try:
            start = tick()
            kernel = step()
            synchronize(attention.query.device)
            first = tick() - start
            wrong = _wrong(backend, attention, grad)
        except Exception as error:  # a backend may raise anything
            wrong, out_of_memory = raised(error), is_out_of_memory(error)
        is_wrong = bool(wrong) and not out_of_memory
        outcomes[backend.name] = Outcome(code, first=first, kernel=kernel, reason=wrong, wrong=is_wrong)
        if not wrong:
            runs[backend.name] = _repeat(step)
    return time_in_turns(outcomes, runs, attention.query.device, rounds, tick)


def _repeat(step: Callable[[], object]) -> Preparation:
    return lambda count: nullcontext([step] * count)


def dense_bytes(attention: Attention, grad: bool) -> int:
    """Return an estimate of the bytes that a dense backend needs for the scores of ``attention``."""
    keys = sum(segment.kv_len for segment in attention.segments)
    grid = attention.batch * attention.heads * attention.q_len * keys * attention.query.itemsize
    return grid * (GRIDS + (GRIDS_KEPT if grad else 0))


def raised(error: Exception) -> str:
    """Return the text of an outcome without a time: the type and the first line of an error."""
    return f"raised {type(error).__name__}: {error}".partition("\n")[0]


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error means that the memory was full. Full memory is not a fault of the backend."""
    # The CPU allocator of torch raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)
    )


def _wrong(backend: Backend, attention: Attention, grad: bool) -> str:
    """Return the checks that fail the error rule, as text. The text is empty if all checks pass."""
    report = check_attention("tune", attention, backend, grad=grad, max_rows=ROWS)
    return "; ".join(str(check) for check in report.checks if not check.ok)


def _step(backend: Backend, attention: Attention, grad: bool) -> Callable[[], str]:
    """Return a function that runs ``backend`` on ``attention`` once and returns the name of the kernel."""
    leaves = tuple({id(tensor): tensor for tensor in attention.tensors() if tensor.requires_grad}.values())
    shape = (attention.batch, attention.heads, attention.q_len, attention.value_dim)
    cotangent = torch.ones(shape, dtype=attention.query.dtype, device=attention.query.device)

    def run() -> str:
        with torch.set_grad_enabled(grad):
            result = execute(backend, attention)
            if grad:
                torch.autograd.grad(result.output, leaves, cotangent, allow_unused=True)
        return result.kernel

    return run


def time_in_turns(
    outcomes: dict[str, Outcome], runs: dict[str, Preparation], device: torch.device, rounds: int, tick: Clock
) -> dict[str, Outcome]:
    """Return ``outcomes`` with the median seconds of one run, or with the reason why a run raised.

    ``runs`` has the preparation of each contender to time. The contenders run alternately. Preparations are not timed.
    """
    outcomes = dict(outcomes)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    counts = dict.fromkeys(runs, 1)

    def sample(name: str) -> float | None:
        try:
            with runs[name](counts[name]) as steps:
                synchronize(device)
                start = tick()
                for step in steps:
                    step()
                synchronize(device)
                return (tick() - start) / len(steps)
        except Exception as error:
            outcomes[name] = replace(outcomes[name], reason=raised(error), wrong=not is_out_of_memory(error))
            del samples[name]
            return None

    for name in runs:
        seconds = sample(name)
        if seconds is not None:
            counts[name] = min(MOST_RUNS, math.ceil(SAMPLE_SECONDS / seconds)) if seconds > 0.0 else MOST_RUNS
    for turn in range(rounds):
        limit = HOPELESS * min((times[0] for times in samples.values() if times), default=math.inf)
        for name in list(samples):
            if turn == 0 or samples[name][0] <= limit:
                seconds = sample(name)
                if seconds is not None:
                    samples[name].append(seconds)
    for name, times in samples.items():
        outcomes[name] = replace(outcomes[name], seconds=statistics.median(times))
    return outcomes


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all submitted work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
