"""Block masks of several segments side by side, from their structure: nothing is as large as ``q_len x kv_len``.

The keys of all segments stand one after the other. A block of queries and a block of keys are *full* (every query sees
every key), *partial* (the mask has to be asked) or left out; FlexAttention (Dong et al. 2024, arXiv:2412.05496) takes
the numbers of both kinds per block of queries.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.common.remember import Memory
from attnzoo.spec.patterns import Pattern
from attnzoo.spec.segments import Attention

# (queries, keys) per block. Kernels on CUDA take tiles of up to 128 queries out of a block.
BLOCKS = {"cpu": (64, 64), "cuda": (128, 128)}


class BlockIndices(NamedTuple):
    """What ``BlockMask.from_kv_blocks`` takes: counts ``(batch, 1, n)``, indices ``(batch, 1, n, m)``."""

    partial_count: Tensor
    partial: Tensor
    full_count: Tensor
    full: Tensor


_memory = Memory()


def starts_of(attention: Attention) -> tuple[int, ...]:
    """Where each segment's keys start among all of them; the last is the number of keys."""
    return (0, *accumulate(segment.kv_len for segment in attention.segments))


def block_indices(attention: Attention) -> BlockIndices:
    """The blocks of an attention: made once for all layers that have the same patterns, lengths and key masks."""
    masks = [segment.key_mask for segment in attention.segments]
    key = (
        tuple(segment.pattern for segment in attention.segments),
        (attention.q_len, *starts_of(attention)),
        tuple(mask is None for mask in masks),
        attention.batch,
        attention.query.device,
    )
    return _memory.get(key, tuple(mask for mask in masks if mask is not None), lambda: _indices(attention))


def real_keys(attention: Attention) -> Tensor:
    """``(batch or 1, keys)`` bool: which keys are not padding, of all segments side by side."""
    masks = [segment.key_mask for segment in attention.segments]
    batch = 1 if all(mask is None for mask in masks) else attention.batch
    ones = attention.query.new_ones
    parts = [
        ones((batch, segment.kv_len), dtype=torch.bool) if mask is None else mask
        for segment, mask in zip(attention.segments, masks, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _indices(attention: Attention) -> BlockIndices:
    starts, device = starts_of(attention), attention.query.device
    patterns = tuple(segment.pattern for segment in attention.segments)
    sizes = BLOCKS[device.type]
    seen, full = (grid[None].to(device) for grid in _grids(patterns, attention.q_len, starts, *sizes))
    real = real_keys(attention)
    places = seen.shape[2] * sizes[1]
    per_block = torch.nn.functional.pad(real, (0, places - starts[-1])).unflatten(1, (-1, sizes[1])).sum(-1)
    seen, full = seen & (per_block > 0)[:, None], full & (per_block == sizes[1])[:, None]
    seen, full = (grid.expand(attention.batch, -1, -1) for grid in (seen, full))
    return BlockIndices(*_listed(seen & ~full), *_listed(full))


def _listed(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and numbers of the blocks that are set in ``(batch, n, m)``, in int32; unset ones fill the rest."""
    order = grid[:, None].byte().argsort(dim=-1, descending=True, stable=True)
    return grid[:, None].sum(-1, dtype=torch.int32), order.to(torch.int32)


@lru_cache(maxsize=64)
def _grids(
    patterns: tuple[Pattern, ...], q_len: int, starts: tuple[int, ...], q_block: int, kv_block: int
) -> tuple[Tensor, Tensor]:
    """By structure alone, which blocks are seen and which are full: ``(blocks of queries, blocks of keys)`` bool.

    A block that reaches across the end of a segment is never full. There are two blocks at least: to a compiler, 1 is a
    constant.
    """
    shape = (max(2, -(-q_len // q_block)), max(2, -(-starts[-1] // kv_block)))
    seen, full = (torch.zeros(shape, dtype=torch.bool, device="cpu") for _ in range(2))
    for row in range(-(-q_len // q_block)):
        queries = (row * q_block, min(q_len, (row + 1) * q_block))
        for pattern, start, stop in zip(patterns, starts, starts[1:], strict=False):
            for first, last in pattern.kv_spans(*queries, q_len, stop - start):
                begin, end = (start + first) // kv_block, -(-(start + last) // kv_block)
                seen[row, begin:end] = True
                runs = [(max(begin, -(-start // kv_block)), min(end, stop // kv_block))]
                while runs:  # of blocks; halved until all of a run is seen, or it is one block
                    head, tail = runs.pop()
                    keys = (head * kv_block - start, tail * kv_block - start)
                    if head < tail and pattern.sees_all(*queries, *keys, q_len, stop - start):
                        full[row, head:tail] = True
                    elif tail - head > 1:
                        runs += [(head, (head + tail) // 2), ((head + tail) // 2, tail)]
    return seen, full
