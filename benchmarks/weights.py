"""Random weights spread so that attention is far from uniform.

At the default initialisation attention is nearly uniform, and a wrong mask goes unseen. Here projections have standard
deviation ``1.5 / sqrt(fan_in)`` and embeddings 1, so that masks and biases move the logits by tenths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# A prime number of samples: rows of a repeated matrix never line up.
_POOL = 4_194_301


@contextmanager
def skip_initialisation() -> Iterator[None]:
    """Build a model without initialising weights that are overwritten anyway (seconds per model)."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # where transformers keeps it elsewhere, building is slower and nothing else
        yield
        return
    with no_init_weights():
        yield


@torch.no_grad()
def spread(model: nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter, the same way for the same seed in every process.

    Samples come from one pool of normal numbers, read from a random start for each parameter: filling 160 million
    weights takes a fraction of a second, which matters where every measurement has a process of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(_POOL).normal_(generator=generator)
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = owners[name.rpartition(".")[0]]
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        embedding = isinstance(owner, nn.Embedding) or "embed" in name
        std = 1.0 if embedding else 1.5 / math.sqrt(parameter.shape[-1])
        start = int(torch.randint(_POOL, (1,), generator=generator))
        _fill(parameter.view(-1), pool, start)
        parameter.mul_(std)


def _fill(flat: Tensor, pool: Tensor, start: int) -> None:
    position = 0
    while position < len(flat):
        count = min(len(pool) - start, len(flat) - position)
        flat[position : position + count].copy_(pool[start : start + count])
        position, start = position + count, 0
