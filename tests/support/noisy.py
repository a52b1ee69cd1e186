"""Worker processes preload this module. It replaces their end-to-end check by a check that may write to stderr."""

import multiprocessing
from typing import Any

import torch

from attnzoo.benchmarks import worker
from attnzoo.benchmarks.witness import witness

kept: list[Any] = []


def check(job: worker.EndToEndJob) -> tuple[bool, str]:
    kept.append(multiprocessing.RLock())  # compiling a kernel creates such a lock, through tqdm
    states = torch.ones(1, 1, 2, 8)
    with witness() as ran:
        torch.nn.functional.scaled_dot_product_attention(states, states, states)
    return bool(ran), ""


worker.verify_here = check
