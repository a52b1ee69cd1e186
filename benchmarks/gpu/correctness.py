"""Verdicts on the numbers of all backends: a sample of the conformance kit, and whole models."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import torch

from attnzoo.backend import Backend
from attnzoo.benchmarks.cases import AUTO, backend_of
from attnzoo.benchmarks.gpu.results import Keep, Results, Verdict
from attnzoo.benchmarks.gpu.settings import Settings
from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.rows import OK, RED
from attnzoo.benchmarks.worker import EndToEndJob, as_problem, verify_here
from attnzoo.conformance.cases import cases
from attnzoo.conformance.kit import run_case

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def attentions(settings: Settings, keep: Keep, seconds: float) -> None:
    """Run a random sample of the conformance kit on each backend, forward and all gradients.

    Each backend gets an equal share of ``seconds``. The order of the cases is random, but the same in every run.
    """
    verdicts: list[Verdict] = []
    names = [name for name in settings.backends() if name != AUTO]
    for name in names:
        backend = backend_of(name)
        assert isinstance(backend, Backend)
        verdicts += _sample(backend, settings.device, seconds / len(names))
        keep(Results(verdicts=tuple(verdicts)))


def _sample(backend: Backend, device: str, seconds: float) -> Iterator[Verdict]:
    sample = list(cases(_DTYPES))
    random.Random(0).shuffle(sample)
    deadline, ran, refused, failed = time.monotonic() + seconds, 0, 0, 0
    for case in sample:
        if time.monotonic() > deadline:
            break
        outcome = run_case(backend, case, device)
        ran, refused = ran + 1, refused + outcome.refused
        if outcome.failure:
            failed += 1
            yield Verdict(f"{backend.name}: {case}", RED, outcome.failure)
    detail = f"{ran} of {len(sample)} cases, {refused} of them refused, {failed} failed"
    yield Verdict(f"{backend.name}: conformance kit", RED if failed else OK, detail)


def models(settings: Settings, keep: Keep, seq_len: int) -> None:
    """Compare a one-layer model of each family, forward and gradients, with the oracle, on each backend."""
    verdicts: list[Verdict] = []
    for family in WORKLOADS:
        for backend in settings.backends():
            job = EndToEndJob(family, backend, seq_len, settings.dtype, settings.device, 1, gradients=True)
            try:
                ok, report = verify_here(job)
                status = OK if ok else RED
            except Exception as error:
                problem = as_problem(error)
                status, report = problem.status, problem.reason
            verdicts.append(Verdict(f"{family}, whole model: {backend}", status, "" if status == OK else report))
            keep(Results(verdicts=tuple(verdicts)))
