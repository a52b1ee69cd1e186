"""Stacks of queries with equal positions, for a bias by position such as that of LongT5's global blocks.

If ``n`` consecutive queries always share a position, then the queries 0, n, 2n, ... have the same positions as the
queries 1, n + 1, 2n + 1, ..., and so equal biases. One kernel call computes all ``n`` sets of queries with one mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.common.blocks import DENSE_ROWS, Part, additive, block_at, sees_all
from attnzoo.backends.sdpa.part_masks import PartMasks
from attnzoo.backends.sdpa.stacks import Scratch, Stack
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.segments import Attention

# The largest number of queries per call. More queries need larger masks, fewer queries need more calls.
_ROWS = 2048
# The smallest number of groups per call, which is the number of rows in the kernel's matrix products.
_FEWEST = 16


class GroupedStack(NamedTuple):
    """``groups`` groups of ``size`` consecutive queries of one sample. All queries of a group have the same position.

    The kernel call has the heads in the batch dimension and the queries of a group in the head dimension.
    """

    attention: Attention
    sample: int
    q_start: int
    size: int
    groups: int
    part: Part  # all keys of the segment

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.part,)

    def take(self, tensor: Tensor) -> Tensor:
        """Return the query rows ``(heads, size, groups, ...)`` as a view of ``(batch, heads, q_len, ...)``."""
        rows = tensor[self.sample, :, self.q_start : self.q_start + self.size * self.groups]
        return rows.unflatten(1, (self.groups, self.size)).transpose(1, 2)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        self.take(tensor).copy_(values)

    def keys(self, number: int, tensor: Tensor, heads: int, scratch: Scratch) -> Tensor:
        """Return all keys or values, ``(heads, size, kv_len, dim)``."""
        rows = scratch.contiguous_rows(tensor[self.sample : self.sample + 1])
        return expand_heads(rows, heads)[0][:, None].expand(-1, self.size, -1, -1)

    def mask(self, masks: PartMasks, number: int) -> tuple[Tensor, Tensor | None]:
        """Return the additive mask ``(heads, size, groups, kv_len)``, and which queries see a key (None: all)."""
        attention, segment = self.attention, self.attention.segments[self.part.segment]
        bias = segment.bias
        if not isinstance(bias, RelativeBias) or bias.positions is None:
            raise TypeError(f"segment {self.part.segment}: got bias {bias}; allowed: RelativeBias with positions")
        firsts = slice(self.q_start, self.q_start + self.size * self.groups, self.size)
        values = bias.at_positions(bias.positions[self.sample, firsts], segment.kv_len)[:, None]
        visible = None if segment.key_mask is None else segment.key_mask[self.sample]
        mask = additive(visible, values, attention.query.dtype)
        shape = (attention.heads, self.size, self.groups)
        has_key = visible is None or bool(visible.any())
        rows = None if has_key else torch.zeros(shape, dtype=torch.bool, device=attention.query.device)
        return torch.as_tensor(mask).expand(*shape, -1), rows


def grouped_stacks(attention: Attention, index: int) -> list[GroupedStack]:
    """Return stacks of the groups of a segment, or an empty list if its queries cannot be grouped.

    The stacks need not contain all queries, but contain no query twice.
    """
    segment = attention.segments[index]
    bias = segment.bias
    if not isinstance(bias, RelativeBias) or bias.positions is None or segment.mask is not None:
        return []
    if not sees_all(attention, segment):
        return []
    part = Part(index, 0, segment.kv_len)
    return [
        GroupedStack(attention, sample, start, size, groups, part)
        for sample, positions in enumerate(bias.positions)
        for start, size, groups in _groups(positions)
    ]


def _groups(positions: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield ``(start, size, groups)``: from query ``start``, ``groups`` groups of ``size`` queries."""
    length = positions.shape[0]
    ends = [*((positions[1:] != positions[:-1]).nonzero()[:, 0] + 1).tolist(), length]
    sizes = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
    size, _ = Counter(sizes).most_common(1)[0]
    if size == 1:
        return
    start = 0
    for is_usual, run in groupby(sizes, lambda found: found == size):
        members = list(run)
        while is_usual and members:
            count = min(len(members), max(_FEWEST, _ROWS // size))
            if count >= _FEWEST:
                yield start, size, count
            start += size * count
            members = members[count:]
        start += sum(members)


def other_queries(attention: Attention, index: int, grouped: list[GroupedStack]) -> Iterator[Stack]:
    """Yield stacks of one block each for all queries that are in none of the ``grouped`` stacks of a segment."""
    for sample in range(attention.batch):
        ends = [(g.q_start, g.q_start + g.size * g.groups) for g in grouped if g.sample == sample]
        gaps = zip([0, *(stop for _, stop in ends)], [*(start for start, _ in ends), attention.q_len], strict=True)
        for start, stop in gaps:
            for first in range(start, stop, DENSE_ROWS):
                block = block_at(attention, [index], first, min(stop, first + DENSE_ROWS))
                yield Stack(block, 1, (0,) * len(block.parts), sample)
