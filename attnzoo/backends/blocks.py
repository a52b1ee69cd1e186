"""Cutting an attention into blocks of queries and the spans of keys they can see, with the mask of each part.

Shared by the kernels that skip work by structure. Nothing here is ever as large as ``q_len x kv_len`` for a local
pattern: a part's mask is made when it is needed and thrown away, or reused for the next block that looks the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.segments import Attention, Segment

# Where a mask has to be materialised for a dense pattern, this many query rows of it exist at a time.
DENSE_ROWS = 512


class Part(NamedTuple):
    """Keys ``kv_start:kv_stop`` of segment number ``segment``, as seen by one block of queries."""

    segment: int
    kv_start: int
    kv_stop: int


class Block(NamedTuple):
    """Queries ``q_start:q_stop`` and the parts they look at."""

    q_start: int
    q_stop: int
    parts: tuple[Part, ...]


class PartMask(NamedTuple):
    """Mask of a part.

    Attributes:
        seen: bool, broadcastable to ``(batch, heads, n, m)``; None when everything is visible.
        live: bool, ``seen.any(-1)``: rows that see a key at all.
    """

    seen: Tensor
    live: Tensor


def block_size(attention: Attention) -> int:
    """How many queries to take at once: what the patterns like, and few rows of a grid-shaped mask or bias."""
    q_len = attention.q_len
    sizes = [segment.pattern.block_size(q_len, segment.kv_len) for segment in attention.segments]
    for segment in attention.segments:
        if segment.mask is not None or segment.bias is not None or not sees_all(attention, segment):
            sizes.append(DENSE_ROWS)
    return min(sizes)


def sees_all(attention: Attention, segment: Segment) -> bool:
    """True when the pattern alone lets every query see every key of the segment."""
    return segment.pattern.sees_all(0, attention.q_len, 0, segment.kv_len, attention.q_len, segment.kv_len)


def blocks(attention: Attention, size: int) -> Iterator[Block]:
    """All blocks, first query first."""
    q_len = attention.q_len
    for q_start in range(0, q_len, size):
        q_stop = min(q_len, q_start + size)
        yield Block(
            q_start,
            q_stop,
            tuple(
                Part(index, *span)
                for index, segment in enumerate(attention.segments)
                for span in segment.pattern.kv_spans(q_start, q_stop, q_len, segment.kv_len)
            ),
        )


class Masks:
    """Makes the masks of parts; remembers, per segment, the last one that came from the pattern alone."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._last: dict[int, tuple[tuple[int, ...], PartMask]] = {}

    def of(self, block: Block, part: Part) -> PartMask | None:
        """The mask of a part of a block, or None when every key is visible to every query."""
        segment, q_len = self._attention.segments[part.segment], self._attention.q_len
        found = None if self._pattern_sees_all(block, part) else self._of_pattern(block, part)
        seen = None if found is None else found.seen
        keys = slice(part.kv_start, part.kv_stop)
        if segment.key_mask is not None:
            key_mask = segment.key_mask[:, keys]
            # Worth a look at the data on the CPU, where most blocks of most batches have no padding; elsewhere it
            # would make the device wait.
            if key_mask.device.type != "cpu" or not bool(key_mask.all()):
                seen = key_mask[:, None, None] if seen is None else seen & key_mask[:, None, None]
        if segment.mask is not None:
            dense = segment.mask[:, :, block.q_start : block.q_stop, keys]
            seen = dense if seen is None else seen & dense
        if seen is None or (found is not None and seen is found.seen):
            return found
        return PartMask(seen, seen.any(-1))

    def _pattern_sees_all(self, block: Block, part: Part) -> bool:
        segment, q_len = self._attention.segments[part.segment], self._attention.q_len
        extent = (block.q_start, block.q_stop, part.kv_start, part.kv_stop, q_len, segment.kv_len)
        return segment.pattern.sees_all(*extent)

    def _of_pattern(self, block: Block, part: Part) -> PartMask:
        segment, q_len = self._attention.segments[part.segment], self._attention.q_len
        extent = (block.q_start, block.q_stop, part.kv_start, part.kv_stop, q_len, segment.kv_len)
        key = segment.pattern.block_key(*extent)
        if key is not None and self._last.get(part.segment, (None,))[0] == key:
            return self._last[part.segment][1]
        device = self._attention.query.device
        q = torch.arange(block.q_start, block.q_stop, device=device)[None, None, :, None]
        kv = torch.arange(part.kv_start, part.kv_stop, device=device)[None, None, None, :]
        zero = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device)
        seen = segment.pattern.mask_mod(q_len, segment.kv_len)(zero, zero, q, kv)
        mask = PartMask(seen, seen.any(-1))
        if key is not None:
            self._last[part.segment] = (key, mask)
        return mask

    def bias(self, block: Block, part: Part) -> Tensor | None:
        """The bias of a part, broadcastable to ``(batch, heads, n, m)``, or None."""
        segment, attention = self._attention.segments[part.segment], self._attention
        if segment.bias is None:
            return None
        q = torch.arange(block.q_start, block.q_stop, device=attention.query.device)
        kv = torch.arange(part.kv_start, part.kv_stop, device=attention.query.device)
        return segment.bias_at(q, kv, attention.q_len, attention.batch, attention.heads)


def additive(seen: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Mask and bias as one additive term: ``-inf`` where nothing is seen; None when there is neither."""
    if seen is None:
        return None if bias is None else bias.to(dtype)
    if bias is None:
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return bias.to(dtype).masked_fill(~seen, float("-inf"))
