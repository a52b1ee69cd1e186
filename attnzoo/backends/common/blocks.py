"""Cutting an attention into blocks of queries and the spans of keys they can see, with the mask of each part.

Shared by the kernels that skip work by structure. Nothing here is ever as large as ``q_len x kv_len`` for a local
pattern: a part's mask is made when it is needed and thrown away, or reused for the next block that looks the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.common import rows
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import SortedChunks
from attnzoo.spec.segments import Attention, Segment
from attnzoo.spec.transforms import holds

# Where a mask has to be materialised for a dense pattern, this many query rows of it exist at a time.
DENSE_ROWS = 512


class Part(NamedTuple):
    """Keys ``kv_start:kv_stop`` of segment number ``segment``, as seen by one block of queries.

    Or ``keys`` ``(batch, heads, kv_stop)``: which ones, where each head sees others; -1 for none.
    """

    segment: int
    kv_start: int
    kv_stop: int
    keys: Tensor | None = None

    def take(self, tensor: Tensor, heads: int) -> Tensor:
        """The part's rows of keys or values ``(batch, kv_heads, kv_len, dim)`` for all heads: a view, or gathered."""
        if self.keys is None:
            return expand_heads(tensor[:, :, self.kv_start : self.kv_stop], heads)
        return rows.take(tensor, self._shared(self.keys, tensor)).view(*self.keys.shape, -1)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Add ``(batch, heads, m, dim)`` to the part's rows of ``(batch, kv_heads, kv_len, dim)``."""
        batch, kv_heads = tensor.shape[:2]
        if self.keys is not None:
            rows.add_(tensor, self._shared(self.keys, tensor), values.reshape(batch, kv_heads, -1, values.shape[3]))
        else:
            grouped = values if values.shape[1] == kv_heads else values.unflatten(1, (kv_heads, -1)).sum(2)
            tensor[:, :, self.kv_start : self.kv_stop] += grouped

    @staticmethod
    def _shared(keys: Tensor, tensor: Tensor) -> Tensor:
        """Keys by key head: those of the query heads it serves, one after the other; key 0 in place of none."""
        return keys.clamp(min=0).reshape(*tensor.shape[:2], -1)


class Block(NamedTuple):
    """A block of queries and the parts they look at.

    Attributes:
        q_start, q_stop: the queries' range, in their own order or in that of ``queries``.
        parts: what they look at.
        queries: ``(batch, heads, n)`` the queries themselves, where the pattern has them in an order of its own.
    """

    q_start: int
    q_stop: int
    parts: tuple[Part, ...]
    queries: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many queries it has."""
        return self.q_stop - self.q_start

    def take(self, tensor: Tensor) -> Tensor:
        """The block's rows of ``(batch, heads, q_len)`` or ``(batch, heads, q_len, dim)``: a view, or gathered."""
        if self.queries is None:
            return tensor[:, :, self.q_start : self.q_stop]
        return rows.take(tensor, self.queries)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write the block's rows back."""
        if self.queries is None:
            tensor[:, :, self.q_start : self.q_stop] = values
        else:
            rows.put_(tensor, self.queries, values)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Add to the block's rows."""
        if self.queries is None:
            tensor[:, :, self.q_start : self.q_stop] += values
        else:
            rows.add_(tensor, self.queries, values)


class PartMask(NamedTuple):
    """Mask of a part.

    Attributes:
        seen: bool, broadcastable to ``(batch, heads, n, m)``.
        live: bool, ``seen.any(-1)``: rows that see a key at all.
    """

    seen: Tensor
    live: Tensor


def positive_scale(attention: Attention) -> Attention:
    """The same attention with a scale above zero, which kernels count on.

    They take the largest score, or hide keys by ``-inf``, before they scale.
    """
    if attention.scale > 0.0:
        return attention
    sign = -1.0 if attention.scale < 0.0 else 0.0
    return replace(attention, query=attention.query * sign, scale=abs(attention.scale) or 1.0)


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


def passes(attention: Attention) -> list[list[int]]:
    """Segments that share an order of queries, one pass each: those in the queries' own order come first."""
    plain = [i for i, segment in enumerate(attention.segments) if segment.pattern.query_order is None]
    return [group for group in (plain, *([i] for i in range(len(attention.segments)) if i not in plain)) if group]


def blocks(attention: Attention, segments: list[int], size: int) -> Iterator[Block]:
    """All blocks of one pass, first query first. ``size`` is for queries in their own order."""
    q_len = attention.q_len
    pattern = attention.segments[segments[0]].pattern
    q_start = 0
    while q_start < q_len:
        if isinstance(pattern, SortedChunks):  # a block stays within one chunk, so that its spans are its whole truth
            size = min(DENSE_ROWS, pattern.length - (pattern.start + q_start) % pattern.length)
        elif pattern.query_order is not None:
            size = min(DENSE_ROWS, pattern.block_size(q_len, attention.segments[segments[0]].kv_len))
        block = block_at(attention, segments, q_start, min(q_len, q_start + size))
        yield block
        q_start = block.q_stop


def block_at(attention: Attention, segments: list[int], q_start: int, q_stop: int) -> Block:
    """Queries ``q_start:q_stop`` of one pass, and what they look at."""
    parts = tuple(part for index in segments for part in _parts(attention, index, q_start, q_stop))
    order = attention.segments[segments[0]].pattern.query_order
    return Block(q_start, q_stop, parts, None if order is None else order[:, :, q_start:q_stop])


def _parts(attention: Attention, index: int, q_start: int, q_stop: int) -> Iterator[Part]:
    """What queries ``q_start:q_stop``, in their segment's order, look at."""
    segment = attention.segments[index]
    extent = (q_start, q_stop, attention.q_len, segment.kv_len)
    gathered = segment.pattern.gathered(*extent)
    if gathered is None:
        yield from (Part(index, *span) for span in segment.pattern.kv_spans(*extent))
    else:
        for keys in gathered:
            if segment.key_mask is not None:
                shown = segment.key_mask.gather(1, keys.clamp(min=0).flatten(1)).view_as(keys)
                keys = keys.masked_fill(~shown, -1)
            yield Part(index, 0, keys.shape[2], keys)


class Masks:
    """Makes the masks of parts; remembers, per segment, the last one that came from the pattern alone."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._last: dict[int, tuple[tuple[int, ...], PartMask]] = {}
        self._open: dict[int, bool] = {}

    def of(self, block: Block, part: Part) -> PartMask | None:
        """The mask of a part of a block, or None when every key is visible to every query."""
        found = self.of_pattern(block, part)
        keys = self.of_keys(block, part)
        if keys is None:
            return found
        seen = keys if found is None else found.seen & keys
        return PartMask(seen, seen.any(-1))

    def of_pattern(self, block: Block, part: Part) -> PartMask | None:
        """What the pattern alone hides, or None for nothing."""
        segment, q_len = self._attention.segments[part.segment], self._attention.q_len
        pattern = segment.pattern
        extent = (block.q_start, block.q_stop, part.kv_start, part.kv_stop, q_len, segment.kv_len)
        if pattern.sees_all(*extent):
            return None
        if isinstance(pattern, SortedChunks) and block.queries is not None:
            token = pattern.sorted_tensors()[1][:, :, None, part.kv_start : part.kv_stop]
            seen = pattern.visible(block.queries[..., None], token)
            return PartMask(seen, seen.any(-1))
        key = pattern.block_key(*extent)
        if key is not None and self._last.get(part.segment, (None,))[0] == key:
            return self._last[part.segment][1]
        q, kv = self._places(block, part)
        seen = pattern.mask_mod(q_len, segment.kv_len)(*pattern.batch_and_heads(q.device), q, kv.clamp(min=0))
        if part.keys is not None:
            seen = seen & (kv >= 0)
        mask = PartMask(seen, seen.any(-1))
        if key is not None:
            self._last[part.segment] = (key, mask)
        return mask

    def _places(self, block: Block, part: Part) -> tuple[Tensor, Tensor]:
        """The block's queries and the part's keys by index, as masks take them: ``(..., n, 1)`` and ``(..., 1, m)``."""
        device = self._attention.query.device
        q, kv = block.queries, part.keys
        if q is None:
            q = torch.arange(block.q_start, block.q_stop, device=device)[None, None]
        if kv is None:
            kv = torch.arange(part.kv_start, part.kv_stop, device=device)[None, None]
        return q[..., None], kv[:, :, None]

    def of_keys(self, block: Block, part: Part) -> Tensor | None:
        """What key mask and dense mask leave visible: bool, broadcastable to ``(batch, heads, n, m)``; None for all."""
        segment, keys = self._attention.segments[part.segment], slice(part.kv_start, part.kv_stop)
        seen: Tensor | None = None
        if part.keys is not None:  # none of them is hidden by the key mask
            if segment.mask is None:
                return None
            dense = segment.mask.expand(self._attention.batch, self._attention.heads, -1, -1)
            index = part.keys.clamp(min=0)[:, :, None].expand(-1, -1, block.q_stop - block.q_start, -1)
            return block.take(dense).gather(3, index)
        if segment.key_mask is not None and not self._all_seen(part.segment):
            key_mask = segment.key_mask[:, keys]
            # Worth a look at the data on the CPU, where most blocks of most batches have no padding; elsewhere it
            # would make the device wait.
            if key_mask.device.type != "cpu" or not holds(key_mask.all(), unknown=False):
                seen = key_mask[:, None, None]
        if segment.mask is not None:
            dense = segment.mask[..., keys].expand(self._attention.batch, self._attention.heads, -1, -1)
            dense = (
                segment.mask[:, :, block.q_start : block.q_stop, keys] if block.queries is None else block.take(dense)
            )
            seen = dense if seen is None else seen & dense
        return seen

    def _all_seen(self, index: int) -> bool:
        """Whether the key mask of a segment hides nothing, as far as that is known without waiting for a device."""
        if index not in self._open:
            key_mask = self._attention.segments[index].key_mask
            on_cpu = key_mask is not None and key_mask.device.type == "cpu"
            self._open[index] = key_mask is None or (on_cpu and holds(key_mask.all(), unknown=False))
        return self._open[index]

    def bias(self, block: Block, part: Part) -> Tensor | None:
        """The bias of a part, broadcastable to ``(batch, heads, n, m)``, or None."""
        attention = self._attention
        device = attention.query.device
        q = torch.arange(block.q_start, block.q_stop, device=device) if block.queries is None else block.queries
        kv = torch.arange(part.kv_start, part.kv_stop, device=device)
        if part.keys is not None and attention.segments[part.segment].bias is not None:
            raise NotImplementedError("a bias on keys that each head gathers: the backend should have refused it")
        return attention.segments[part.segment].bias_at(q, kv, attention.q_len, attention.batch, attention.heads)

    def key(self, block: Block, part: Part) -> tuple[object, ...] | None:
        """Blocks of equal key have equal masks by pattern and equal biases; None: no promise."""
        segment, q_len = self._attention.segments[part.segment], self._attention.q_len
        extent = (block.q_start, block.q_stop, part.kv_start, part.kv_stop, q_len, segment.kv_len)
        by_pattern: tuple[object, ...] | None = segment.pattern.block_key(*extent)
        if segment.pattern.sees_all(*extent):
            by_pattern = ("all", block.q_stop - block.q_start, part.kv_stop - part.kv_start)
        by_bias = () if segment.bias is None else segment.bias.block_key(*extent)
        return None if by_pattern is None or by_bias is None else (by_pattern, by_bias)


def live_rows(attention: Attention) -> Tensor:
    """Which rows see a key: ``(batch, heads or 1, q_len)`` bool, for patterns of queries in their own order."""
    masks, found = Masks(attention), []
    for block in blocks(attention, list(range(len(attention.segments))), block_size(attention)):
        live = attention.query.new_zeros((attention.batch, 1, block.rows), dtype=torch.bool)
        for part in block.parts:
            mask = masks.of(block, part)
            live = torch.ones_like(live) if mask is None else live | mask.live
        found.append(live)
    heads = max(live.shape[1] for live in found)
    return torch.cat([live.expand(-1, heads, -1) for live in found], dim=2)


def additive(seen: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Mask and bias as one additive term: ``-inf`` where nothing is seen; None when there is neither."""
    if seen is None:
        return None if bias is None else bias.to(dtype)
    if bias is None:
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return bias.to(dtype).masked_fill(~seen, float("-inf"))
