"""Which weights do the models have? Random weights with a large spread, so that attention is far from uniform.

At the default initialisation attention is nearly uniform, and a wrong mask has no visible effect. Here projections have
standard deviation ``1.5 / sqrt(fan_in)`` and embeddings 1: a wrong mask or bias changes the logits by tenths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# The number of samples is prime, so that the rows of a repeated matrix are never aligned.
_POOL = 4_194_301


@contextmanager
def skip_initialisation() -> Iterator[None]:
    """Build models without initialising their weights, which :func:`spread` overwrites (saves seconds per model)."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # other versions of transformers may lack it: then building a model is only slower
        yield
        return
    with no_init_weights():
        yield


@torch.no_grad()
def spread(model: nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter; the same seed gives the same weights in every process.

    All samples come from one pool of normal numbers, which each parameter reads from a random start. Every row has its
    own process and builds its own model: this fills 160 million weights in a fraction of a second.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(_POOL).normal_(generator=generator)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        is_embedding = isinstance(modules[name.rpartition(".")[0]], nn.Embedding) or "embed" in name
        std = 1.0 if is_embedding else 1.5 / math.sqrt(parameter.shape[-1])
        start = int(torch.randint(_POOL, (1,), generator=generator))
        _fill(parameter.view(-1), pool, start)
        parameter.mul_(std)


def _fill(flat: Tensor, pool: Tensor, start: int) -> None:
    position = 0
    while position < len(flat):
        count = min(len(pool) - start, len(flat) - position)
        flat[position : position + count].copy_(pool[start : start + count])
        position, start = position + count, 0
