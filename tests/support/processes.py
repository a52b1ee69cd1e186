"""Run a function in two processes that talk to each other by gloo."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

COUNT, SECONDS = 2, 60


@contextmanager
def two_processes():
    """Yield a function ``run(function, *arguments)``, which calls ``function(rank, *arguments)`` in each process.

    ``run`` raises the first exception of a process. The processes serve many calls, because they import for seconds.
    """
    with ProcessPoolExecutor(COUNT, mp_context=_context()) as pool:

        def run(function, *arguments):
            with tempfile.TemporaryDirectory() as folder:
                # A process waits for the other in each call, so no process takes both calls.
                calls = [pool.submit(_call, function, rank, folder, arguments) for rank in range(COUNT)]
                for call in calls:
                    call.result()

        yield run


def _context():
    """Return the context that starts processes: if possible, a fork server, which imports torch and a model once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.led.modeling_led"])
    return context


def _call(function, rank, folder, arguments):
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(COUNT))  # as torchrun does
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{Path(folder, 'meeting')}", rank=rank, world_size=COUNT,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    try:
        function(rank, *arguments)
    finally:
        torch.distributed.destroy_process_group()
