"""Block lists: for each block of queries, the blocks of keys that the queries see fully or partly.

The keys of all segments are concatenated. For a block of queries, a block of keys is *full* (every query sees every
key), *partial* (the mask decides) or absent (no query sees a key). Kernels such as FlexAttention read these lists
(Dong et al. 2024, arXiv:2412.05496). No tensor of this module is as large as ``q_len x kv_len``.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.common.tensor_cache import TensorCache
from attnzoo.spec.patterns import Pattern, Tile
from attnzoo.spec.segments import Attention


class BlockShape(NamedTuple):
    """The number of queries and the number of keys of one block."""

    queries: int
    keys: int


class BlockLists(NamedTuple):
    """The number and the indices of the blocks of keys that each block of queries sees.

    The fields are the arguments of FlexAttention's ``BlockMask.from_kv_blocks``, all int32. ``n`` is the number of
    blocks of queries, and ``m`` is the number of blocks of keys.
    """

    partial_count: Tensor  # (batch, 1, n), how many partial blocks each block of queries sees
    partial: Tensor  # (batch, 1, n, m), the indices of these partial blocks, then entries without meaning
    full_count: Tensor  # (batch, 1, n), how many full blocks each block of queries sees
    full: Tensor  # (batch, 1, n, m), the indices of these full blocks, then entries without meaning


_cache = TensorCache()


def segment_starts(attention: Attention) -> tuple[int, ...]:
    """Return the index of each segment's first key in the concatenated keys, followed by the number of all keys."""
    return (0, *accumulate(segment.kv_len for segment in attention.segments))


def unpadded_keys(attention: Attention) -> Tensor:
    """Return a bool tensor ``(batch or 1, keys of all segments)`` with False for keys that a key mask hides."""
    masks = [segment.key_mask for segment in attention.segments]
    batch = 1 if all(mask is None for mask in masks) else attention.batch
    ones = torch.ones((batch, 1), dtype=torch.bool, device=attention.query.device)
    pairs = zip(attention.segments, masks, strict=True)
    return torch.cat([ones.expand(-1, segment.kv_len) if mask is None else mask for segment, mask in pairs], dim=1)


def block_lists(attention: Attention, shape: BlockShape) -> BlockLists:
    """Return the block lists of an attention. Layers with equal patterns, lengths and key masks share cached lists.

    The lists ignore dense masks. A block may contain keys of several segments.
    """
    masks = [segment.key_mask for segment in attention.segments]
    key = (
        *(tuple(segment.pattern for segment in attention.segments), shape, attention.q_len, segment_starts(attention)),
        *(tuple(mask is None for mask in masks), attention.batch, attention.query.device),
    )
    given = tuple(mask for mask in masks if mask is not None)
    return _cache.get(key, given, lambda: _make_lists(attention, shape))


def _make_lists(attention: Attention, shape: BlockShape) -> BlockLists:
    starts, device = segment_starts(attention), attention.query.device
    patterns = tuple(segment.pattern for segment in attention.segments)
    visible, full = (grid[None].to(device) for grid in _grids(patterns, attention.q_len, starts, shape))
    padding = visible.shape[2] * shape.keys - starts[-1]
    unpadded = torch.nn.functional.pad(unpadded_keys(attention), (0, padding)).unflatten(1, (-1, shape.keys)).sum(-1)
    visible, full = visible & (unpadded > 0)[:, None], full & (unpadded == shape.keys)[:, None]
    visible, full = (grid.expand(attention.batch, -1, -1) for grid in (visible, full))
    return BlockLists(*_listed(visible & ~full), *_listed(full))


def _listed(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many entries of each row of ``grid`` are True, and the indices of all entries, True entries first.

    For example, the row [False, True, False, True] gives 2 and [1, 3, 0, 2].
    """
    order = grid[:, None].byte().argsort(dim=-1, descending=True, stable=True)
    return grid[:, None].sum(-1, dtype=torch.int32), order.to(torch.int32)


@lru_cache(maxsize=64)
def _grids(
    patterns: tuple[Pattern, ...], q_len: int, starts: tuple[int, ...], shape: BlockShape
) -> tuple[Tensor, Tensor]:
    """Return two bool grids ``(blocks of queries, blocks of keys)``.

    The first grid is True for full and partial blocks of keys, the second grid only for full blocks. The grids ignore
    key masks and dense masks. A block with keys of several segments is never full. Both sizes of a grid are at least 2,
    because a compiler treats a size of 1 as a constant.
    """
    counts = (-(-q_len // shape.queries), -(-starts[-1] // shape.keys))
    visible, full = (torch.zeros([max(2, count) for count in counts], dtype=torch.bool, device="cpu") for _ in range(2))
    for row in range(counts[0]):
        queries = (row * shape.queries, min(q_len, (row + 1) * shape.queries))
        for pattern, start, stop in zip(patterns, starts, starts[1:], strict=False):
            for first, last in pattern.kv_spans(*queries, q_len, stop - start):
                begin, end = (start + first) // shape.keys, -(-(start + last) // shape.keys)
                visible[row, begin:end] = True
                # Halve each run of key blocks until the run is full or has a single block.
                runs = [(max(begin, -(-start // shape.keys)), min(end, stop // shape.keys))]
                while runs:
                    head, tail = runs.pop()
                    keys = (head * shape.keys - start, tail * shape.keys - start)
                    if head < tail and pattern.sees_all(Tile(*queries, *keys, q_len, stop - start)):
                        full[row, head:tail] = True
                    elif tail - head > 1:
                        runs += [(head, (head + tail) // 2), ((head + tail) // 2, tail)]
    return visible, full
