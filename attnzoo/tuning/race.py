"""Timing backends against each other on one attention, behind the error rule."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from attnzoo.auto.environment import code_of
from attnzoo.auto.measurements import Outcome
from attnzoo.backend import Backend
from attnzoo.conformance.attention_check import check_attention
from attnzoo.functional import execute
from attnzoo.spec.segments import Attention

Clock = Callable[[], float]

ROUNDS = 7
# A timed sample lasts this long at least (seconds), by running more than once; clocks and launches are not what counts.
SAMPLE, MOST_RUNS = 0.005, 50
# What takes this many times as long as the fastest in the first round is not timed again.
HOPELESS = 3.0
# Backends that need memory for every query and key are left out above this many bytes of it.
DENSE_BYTES = 2 << 30
# Grids of scores that plain operations hold at once, and those that are kept for a backward.
GRIDS, GRIDS_KEPT = 6, 4
ROWS = 64


def race(
    attention: Attention, backends: Sequence[Backend], *, grad: bool, rounds: int = ROUNDS, clock: Clock | None = None
) -> dict[str, Outcome]:
    """Time backends on an attention in turns: medians of ``rounds`` samples, warm-up and compilation left out.

    What is outside the error rule on sampled rows, or raises, is no candidate and is not timed; what ran out of memory
    is not timed, but not found to be wrong either.

    Args:
        attention: what to compute, on tensors without a history; those that require grad get gradients.
        backends: those that refuse nothing of it.
        grad: time forward and backward; else forward without gradients.
        rounds: samples per backend.
        clock: seconds; None: ``time.perf_counter``.

    Returns:
        One :class:`Outcome` per backend, by name.
    """
    tick = time.perf_counter if clock is None else clock
    outcomes: dict[str, Outcome] = {}
    runs: dict[str, Callable[[], str]] = {}
    for backend in backends:
        code = code_of(type(backend))
        need = dense_bytes(attention, grad)
        if backend.dense and need > DENSE_BYTES:
            got = f"needs about {need / (1 << 30):.1f} GiB for dense scores, is timed up to {DENSE_BYTES >> 30} GiB"
            outcomes[backend.name] = Outcome(code, reason=got)
            continue
        step, kernel, first, full = _step(backend, attention, grad), "", 0.0, False
        try:
            start = tick()
            kernel = step()
            _wait(attention.query.device)
            first = tick() - start
            wrong = _wrong(backend, attention, grad)
        except Exception as error:  # whatever it raises is why it is no candidate
            wrong, full = _raised(error), _out_of_memory(error)
        outcomes[backend.name] = Outcome(code, first=first, kernel=kernel, reason=wrong, wrong=bool(wrong) and not full)
        if not wrong:
            runs[backend.name] = step
    for name, seconds in _times(runs, attention.query.device, rounds, tick).items():
        if isinstance(seconds, Exception):
            outcomes[name] = replace(outcomes[name], reason=_raised(seconds), wrong=not _out_of_memory(seconds))
        else:
            outcomes[name] = replace(outcomes[name], seconds=seconds)
    return outcomes


def dense_bytes(attention: Attention, grad: bool) -> int:
    """Bytes that plain operations need, roughly."""
    keys = sum(segment.kv_len for segment in attention.segments)
    grid = attention.batch * attention.heads * attention.q_len * keys * attention.query.itemsize
    return grid * (GRIDS + (GRIDS_KEPT if grad else 0))


def _raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {error}".partition("\n")[0]


def _out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory was full: something of the machine just now, nothing of the backend.

    torch's allocator on the CPU has no class of its own for that.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)
    )


def _wrong(backend: Backend, attention: Attention, grad: bool) -> str:
    """What is wrong with the backend's numbers; empty if they are within the error rule."""
    report = check_attention("tune", attention, backend, grad=grad, max_rows=ROWS)
    return "; ".join(str(check) for check in report.checks if not check.ok)


def _step(backend: Backend, attention: Attention, grad: bool) -> Callable[[], str]:
    """One run, as a model would; returns the kernel that ran."""
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


def _times(
    runs: dict[str, Callable[[], str]], device: torch.device, rounds: int, tick: Clock
) -> dict[str, float | Exception]:
    """Median seconds of one run, by name; or what it raised, in whatever round: the others go on."""
    failed: dict[str, float | Exception] = {}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    counts = dict.fromkeys(runs, 1)

    def sample(name: str) -> float | None:
        try:
            _wait(device)
            start = tick()
            for _ in range(counts[name]):
                runs[name]()
            _wait(device)
            return (tick() - start) / counts[name]
        except Exception as error:
            failed[name] = error
            del samples[name]
            return None

    for name in runs:
        once = sample(name)
        if once is not None:
            counts[name] = min(MOST_RUNS, math.ceil(SAMPLE / once)) if once > 0.0 else MOST_RUNS
    for turn in range(rounds):
        limit = HOPELESS * min((taken[0] for taken in samples.values() if taken), default=math.inf)
        for name in list(samples):
            if turn == 0 or samples[name][0] <= limit:
                taken = sample(name)
                if taken is not None:
                    samples[name].append(taken)
    return failed | {name: statistics.median(taken) for name, taken in samples.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
