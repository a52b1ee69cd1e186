"""Count what a call of an attention module starts on the device, how often it waits, and what it costs the host."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attnzoo.benchmarks.cases import Case, Subject
from attnzoo.benchmarks.contenders import BackendContender, Contender, Original
from attnzoo.benchmarks.gpu.results import Call, Keep, Results, Verdict
from attnzoo.benchmarks.gpu.settings import Settings, load_models
from attnzoo.benchmarks.measure import cpu_seconds
from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.rows import FAILED
from attnzoo.benchmarks.worker import as_problem
from attnzoo.tuning.race import synchronize

# Calls of the CUDA runtime in which the host waits for the device.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def calls(settings: Settings, keep: Keep, seq_len: int) -> None:
    """Count and time a call of one module of each family: original and backends, forward and forward+backward.

    The input is short. So the device never has more work than the host can start, and the host never waits for it.
    """
    counted: list[Call] = []
    verdicts: list[Verdict] = []
    contenders: list[Contender] = [Original(), *map(BackendContender, settings.backends())]
    load_models(WORKLOADS)
    for family in WORKLOADS:
        for contender in contenders:
            for train in (False, True):
                case = Case(family, "module", seq_len, 1, settings.dtype, settings.device, 1, train)
                try:
                    counted.append(_count(contender, case))
                except Exception as error:
                    problem = as_problem(error)
                    if problem.status == FAILED:
                        what = f"{family}, one call, {case.mode}: {contender.name}"
                        verdicts.append(Verdict(what, problem.status, problem.reason))
            keep(Results(verdicts=tuple(verdicts), calls=tuple(counted)))
            gc.collect()


def _count(contender: Contender, case: Case) -> Call:
    contender.check(case)
    subject = contender.prepare(case).subject
    step = _clean_step(subject)
    step()
    step()  # the first call compiles and plans
    synchronize(torch.device(case.device))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if case.device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        step()
    events = profiled.events() or []
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    waits = sum(event.name in _WAITS for event in events) - _waits_of_the_profiler(case.device, activities)
    launches = len(on_device) if on_device else None
    seconds = sum(event.time_range.elapsed_us() for event in on_device) / 1e6 if on_device else None
    return Call(case.family, contender.name, case.seq_len, case.mode, launches, waits, seconds, cpu_seconds(step))


def _clean_step(subject: Subject) -> Callable[[], None]:
    def step() -> None:
        subject.step()
        subject.clear()

    return step


def _waits_of_the_profiler(device: str, activities: list[ProfilerActivity]) -> int:
    """Return how often the host waits in a profile of nothing, because the profiler waits when it ends."""
    with profile(activities=activities) as profiled:
        if device == "cuda":
            torch.empty(1, device=device)
    return sum(event.name in _WAITS for event in profiled.events() or [])
