"""Fill models with random weights of a large standard deviation, so that attention is far from uniform.

With the default initialisation, attention is nearly uniform, and a wrong mask has no visible effect. Here, the standard
deviation is ``1.5 / sqrt(fan_in)`` in projections and 1 in embeddings. A wrong mask changes logits by several tenths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Size of the pool of random numbers. The size is prime, so that a matrix larger than the pool has no equal rows.
_POOL = 4_194_301


@contextmanager
def skip_initialisation() -> Iterator[None]:
    """Context manager that skips the initialisation of weights, because :func:`spread` overwrites all weights."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # versions of transformers without this function only build models more slowly
        yield
        return
    with no_init_weights():
        yield


@torch.no_grad()
def spread(model: nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter. The same seed gives the same weights in every process.

    Every matrix is filled from one pool of normal random numbers, starting at a random place in the pool. This fills
    160 million weights in a fraction of a second. Speed is needed, because a model is built for each row.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(_POOL).normal_(generator=generator)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)  # 1 also for temperatures and sinks
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
