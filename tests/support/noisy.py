"""Preloaded by worker processes: their end-to-end check does what made stderr noisy, and checks nothing."""

import multiprocessing
from typing import Any

import torch

from attnzoo.benchmarks import worker
from attnzoo.benchmarks.witness import witness

kept: list[Any] = []


def check(job: worker.Verify) -> tuple[bool, str]:
    kept.append(multiprocessing.RLock())  # as tqdm makes one where a kernel is compiled
    states = torch.ones(1, 1, 2, 8)
    with witness() as ran:
        torch.nn.functional.scaled_dot_product_attention(states, states, states)
    return bool(ran), ""


worker.verify_here = check
