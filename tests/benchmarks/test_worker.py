"""Every row has its own process, which measures the memory of its run and writes nothing to stderr."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from attnzoo.benchmarks.measure import peak_of
from attnzoo.benchmarks.runner import ShootoutPlan, run
from attnzoo.benchmarks.worker import ProcessWorker, process_context
from tests.support import fake_shootout


def test_every_row_has_its_own_process():
    plan = ShootoutPlan(families=("tiny",), backends=(), seq_lens=(40,), modes=(False,), rounds=2)
    context, random_state = process_context(["transformers.models.led.modeling_led"]), torch.get_rng_state()
    contenders = (fake_shootout.TinyOriginal(), fake_shootout.Exiting("exiting"))
    original, dead = run(plan, launch=partial(ProcessWorker, context), contenders=contenders).rows
    assert original.status == "ok" and len(original.runs) == 2, original.reason
    assert dead.status == "failed" and "exit code 3" in dead.reason and dead.seconds is None
    assert torch.equal(torch.get_rng_state(), random_state), "this process draws no random numbers"


_NOISY = """
from attnzoo.benchmarks.worker import EndToEndJob, process_context, verify_in_process

job = EndToEndJob("tiny", "sdpa", 16, "float32", "cpu", 1, False)
print(verify_in_process(process_context(["tests.support.noisy"]), job))
"""


def test_worker_processes_write_nothing_to_stderr():
    """Without care, PyTorch's profiler prints its start and stop, and multiprocessing prints forgotten semaphores."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("KINETO_LOG_LEVEL", None)
    ran = subprocess.run([sys.executable, "-c", _NOISY], capture_output=True, text=True, env=environment, timeout=300)
    assert (ran.stdout, ran.stderr) == ("(True, '')\n", "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the high-water mark")
def test_peak_memory_excludes_earlier_memory():
    torch.ones(200 << 18).sum()  # 200 MiB before the run

    def allocate() -> None:
        torch.ones(64 << 18).sum()  # 64 MiB

    peak = peak_of(allocate, "cpu")
    assert 60 << 20 <= peak.extra <= 100 << 20


_FREED = """
import torch
from attnzoo.benchmarks.measure import peak_of

large = torch.ones(31 << 18)
del large  # glibc now keeps tensors of up to 31 MiB in its heap

def allocate():
    kept = [torch.ones(4 << 18) for _ in range(16)]
    del kept[::2]  # leaves holes of 4 MiB
    kept += [torch.ones(5 << 18) for _ in range(6)]  # does not fit into the holes

print(peak_of(allocate, "cpu").extra)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the high-water mark")
def test_peak_memory_excludes_freed_memory():
    """The test runs in a new process, as rows do, because a long test run leaves memory behind."""
    ran = subprocess.run([sys.executable, "-c", _FREED], capture_output=True, text=True, check=True)
    assert int(ran.stdout) <= 72 << 20  # 16 x 4 MiB; 8 of them are freed before 6 x 5 MiB are allocated
