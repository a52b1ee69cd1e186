"""Cut an attention into blocks of queries and the parts that these queries see, and make the mask of each part.

Kernels that skip hidden keys share this module. For a local pattern no tensor of this module is as large as
``q_len x kv_len``. Only the mask of one part exists at a time, and consecutive parts with equal masks share one mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.common import rows
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import SortedChunks, Tile
from attnzoo.spec.segments import Attention, Segment
from attnzoo.spec.transforms import holds

# The mask of a dense pattern has whole rows. At most this many rows of the mask exist at a time.
DENSE_ROWS = 512
# One block for all queries may compute this many times as many scores as blocks of _SMALL_BLOCK queries.
_MOST_KEYS, _SMALL_BLOCK = 1.5, 32
# The largest number of entries in the mask of one block for all queries. The mask then needs at most 8 MiB in float32.
_DENSE_ENTRIES = 1 << 21


class Part(NamedTuple):
    """Keys that a block of queries sees in one segment.

    If ``keys`` is None, these are the keys ``kv_start:kv_stop`` in all heads. Otherwise the heads see different keys.
    """

    segment: int  # the index of the segment
    kv_start: int  # 0 if ``keys`` is given
    kv_stop: int  # the length of ``keys`` if ``keys`` is given
    keys: Tensor | None = None  # (batch, heads, kv_stop) key indices; -1 means no key

    def take(self, tensor: Tensor, heads: int) -> Tensor:
        """Return the keys or values of this part, ``(batch, heads, m, dim)``, for ``heads`` query heads.

        ``tensor`` has all keys or values of the segment, ``(batch, kv_heads, kv_len, dim)``.
        """
        if self.keys is None:
            return expand_heads(tensor[:, :, self.kv_start : self.kv_stop], heads)
        return rows.take(tensor, self._by_key_head(self.keys, tensor)).view(*self.keys.shape, -1)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Add ``values`` ``(batch, heads, m, dim)`` to the rows of this part in a tensor like that of :meth:`take`."""
        batch, kv_heads = tensor.shape[:2]
        if self.keys is not None:
            values = values.reshape(batch, kv_heads, -1, values.shape[3])
            rows.add_(tensor, self._by_key_head(self.keys, tensor), values)
        else:
            grouped = values if values.shape[1] == kv_heads else values.unflatten(1, (kv_heads, -1)).sum(2)
            tensor[:, :, self.kv_start : self.kv_stop] += grouped

    @staticmethod
    def _by_key_head(keys: Tensor, tensor: Tensor) -> Tensor:
        """Return ``keys`` ``(batch, heads, m)`` as ``(batch, kv_heads, heads // kv_heads * m)``, with 0 for -1.

        Each row of the result has the key indices of all query heads that share one key head.
        """
        return keys.clamp(min=0).reshape(*tensor.shape[:2], -1)


class Block(NamedTuple):
    """A block of queries and the parts that the queries see."""

    q_start: int  # index in the order of the queries: the sequence order, or the ``query_order`` of the pattern
    q_stop: int
    parts: tuple[Part, ...]
    queries: Tensor | None = None  # (batch, heads, n) query indices, if the pattern reorders the queries

    @property
    def rows(self) -> int:
        """The number of queries."""
        return self.q_stop - self.q_start

    def take(self, tensor: Tensor) -> Tensor:
        """Return the rows of this block from a tensor ``(batch, heads, q_len)`` or ``(batch, heads, q_len, dim)``."""
        if self.queries is None:
            return tensor[:, :, self.q_start : self.q_stop]
        return rows.take(tensor, self.queries)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        if self.queries is None:
            tensor[:, :, self.q_start : self.q_stop] = values
        else:
            rows.put_(tensor, self.queries, values)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        if self.queries is None:
            tensor[:, :, self.q_start : self.q_stop] += values
        else:
            rows.add_(tensor, self.queries, values)


def positive_scale(attention: Attention) -> Attention:
    """Return an attention with the same scores and a scale above zero.

    Kernels compute the largest score, or add ``-inf``, before scaling. This is correct only if the scale is positive.
    """
    if attention.scale > 0.0:
        return attention
    sign = -1.0 if attention.scale < 0.0 else 0.0
    return replace(attention, query=attention.query * sign, scale=abs(attention.scale) or 1.0)


def block_size(attention: Attention) -> int:
    """Return the number of queries per block: the smallest of the numbers that the patterns of all segments recommend.

    The number is at most 512 if a segment has a dense mask or a bias, or if its pattern hides keys. If one block for
    all queries is faster (:func:`is_short`), the number is ``q_len``.
    """
    q_len = attention.q_len
    sizes = [segment.pattern.block_size(q_len, segment.kv_len) for segment in attention.segments]
    for segment in attention.segments:
        if segment.mask is not None or segment.bias is not None or not sees_all(attention, segment):
            sizes.append(DENSE_ROWS)
    size = min(sizes)
    return q_len if size < q_len and is_short(attention) else size


def is_short(attention: Attention) -> bool:
    """Return whether one block for all queries is faster on the CPU than several blocks.

    One block computes more scores, but in a single kernel call and in larger matrix products. So one block is faster if
    the blocks would see most keys anyway. :data:`_MOST_KEYS` is measured, see docs/decisions.md.
    """
    segments = attention.segments
    if attention.query.device.type != "cpu" or any(s.pattern.query_order is not None for s in segments):
        return False
    keys = sum(segment.kv_len for segment in segments)
    masks = attention.batch * (1 if all(segment.bias is None for segment in segments) else attention.heads)
    if masks * attention.q_len * keys > _DENSE_ENTRIES:
        return False
    middle = attention.q_len // 2
    block = block_at(attention, list(range(len(segments))), middle, min(attention.q_len, middle + _SMALL_BLOCK))
    return keys <= _MOST_KEYS * sum(part.kv_stop - part.kv_start for part in block.parts)


def sees_all(attention: Attention, segment: Segment) -> bool:
    """Return whether the pattern lets every query see every key of the segment."""
    whole = Tile(0, attention.q_len, 0, segment.kv_len, attention.q_len, segment.kv_len)
    return segment.pattern.sees_all(whole)


def passes(attention: Attention) -> list[list[int]]:
    """Return the segment indices of each pass. Every segment whose pattern has a ``query_order`` has its own pass."""
    plain = [i for i, segment in enumerate(attention.segments) if segment.pattern.query_order is None]
    return [group for group in (plain, *([i] for i in range(len(attention.segments)) if i not in plain)) if group]


def blocks(attention: Attention, segments: list[int], size: int) -> Iterator[Block]:
    """Yield all blocks of one pass (``segments``: its segment indices), in ascending order of ``q_start``.

    A block has at most ``size`` queries. If the pattern reorders the queries, the pattern sets the number of queries.
    """
    q_len = attention.q_len
    pattern = attention.segments[segments[0]].pattern
    q_start = 0
    while q_start < q_len:
        if isinstance(pattern, SortedChunks):  # all queries of a block are in one chunk
            size = min(DENSE_ROWS, pattern.length - (pattern.start + q_start) % pattern.length)
        elif pattern.query_order is not None:
            size = min(DENSE_ROWS, pattern.block_size(q_len, attention.segments[segments[0]].kv_len))
        block = block_at(attention, segments, q_start, min(q_len, q_start + size))
        yield block
        q_start = block.q_stop


def block_at(attention: Attention, segments: list[int], q_start: int, q_stop: int) -> Block:
    """Return the block of the queries ``q_start:q_stop`` (as in :class:`Block`) of one pass."""
    parts = tuple(part for index in segments for part in _parts(attention, index, q_start, q_stop))
    order = attention.segments[segments[0]].pattern.query_order
    return Block(q_start, q_stop, parts, None if order is None else order[:, :, q_start:q_stop])


def _parts(attention: Attention, index: int, q_start: int, q_stop: int) -> Iterator[Part]:
    segment = attention.segments[index]
    where = (q_start, q_stop, attention.q_len, segment.kv_len)
    gathered = segment.pattern.gathered(*where)
    if gathered is None:
        yield from (Part(index, *span) for span in segment.pattern.kv_spans(*where))
    else:
        for keys in gathered:
            if segment.key_mask is not None:
                visible = segment.key_mask.gather(1, keys.clamp(min=0).flatten(1)).view_as(keys)
                keys = keys.masked_fill(~visible, -1)
            yield Part(index, 0, keys.shape[2], keys)


class Masks:
    """Factory of the masks of parts. For each segment, the last mask of :meth:`of_pattern` is cached."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._last: dict[int, tuple[tuple[int, ...], Tensor]] = {}
        self._hides_keys: dict[int, bool] = {}  # per segment: whether the key mask hides a key

    def of(self, block: Block, part: Part) -> Tensor | None:
        """Return the bool mask of a part of a block, or None if every query sees every key.

        The mask is broadcastable to ``(batch, heads, n, m)``, and True where a query sees a key.
        """
        mask = self.of_pattern(block, part)
        keys = self.of_keys(block, part)
        if keys is None:
            return mask
        return keys if mask is None else mask & keys

    def of_pattern(self, block: Block, part: Part) -> Tensor | None:
        """Return the mask of the pattern alone (no key mask, no dense mask), or None if the pattern hides no key."""
        pattern, tile = self._attention.segments[part.segment].pattern, self._tile(block, part)
        if pattern.sees_all(tile):
            return None
        if isinstance(pattern, SortedChunks) and block.queries is not None:
            token = pattern.sorted_tensors()[1][:, :, None, part.kv_start : part.kv_stop]
            return pattern.visible(block.queries[..., None], token)
        if part.keys is not None and pattern.sees_gathered(block.q_start, block.q_stop):
            visible = (part.keys >= 0)[:, :, None]
            return visible if _may_hide(visible) else None
        key = pattern.block_key(tile)
        if key is not None and self._last.get(part.segment, (None,))[0] == key:
            return self._last[part.segment][1]
        q, kv = self._indices(block, part)
        mask_mod = pattern.mask_mod(tile.q_len, tile.kv_len)
        visible = mask_mod(*pattern.batch_and_heads(q.device), q, kv.clamp(min=0))
        if part.keys is not None:
            visible = visible & (kv >= 0)
        if key is not None:
            self._last[part.segment] = (key, visible)
        return visible

    def _tile(self, block: Block, part: Part) -> Tile:
        kv_len = self._attention.segments[part.segment].kv_len
        return Tile(block.q_start, block.q_stop, part.kv_start, part.kv_stop, self._attention.q_len, kv_len)

    def _indices(self, block: Block, part: Part) -> tuple[Tensor, Tensor]:
        """Return the indices of queries ``(..., n, 1)`` and keys ``(..., 1, m)``, as a ``mask_mod`` expects."""
        device = self._attention.query.device
        q, kv = block.queries, part.keys
        if q is None:
            q = torch.arange(block.q_start, block.q_stop, device=device)[None, None]
        if kv is None:
            kv = torch.arange(part.kv_start, part.kv_stop, device=device)[None, None]
        return q[..., None], kv[:, :, None]

    def of_keys(self, block: Block, part: Part) -> Tensor | None:
        """Return key mask and dense mask of a part as one mask, broadcastable to ``(batch, heads, n, m)``.

        None means that these masks hide no further key of the part.
        """
        segment, keys = self._attention.segments[part.segment], slice(part.kv_start, part.kv_stop)
        visible: Tensor | None = None
        if part.keys is not None:  # _parts() has applied the key mask: hidden keys are -1
            if segment.mask is None:
                return None
            dense = segment.mask.expand(self._attention.batch, self._attention.heads, -1, -1)
            index = part.keys.clamp(min=0)[:, :, None].expand(-1, -1, block.rows, -1)
            return block.take(dense).gather(3, index)
        if segment.key_mask is not None:
            if part.segment not in self._hides_keys:
                self._hides_keys[part.segment] = _may_hide(segment.key_mask)
            key_mask = segment.key_mask[:, keys]
            visible = key_mask[:, None, None] if self._hides_keys[part.segment] and _may_hide(key_mask) else None
        if segment.mask is not None:
            if block.queries is None:
                dense = segment.mask[:, :, block.q_start : block.q_stop, keys]
            else:
                dense = block.take(segment.mask[..., keys].expand(self._attention.batch, self._attention.heads, -1, -1))
            visible = dense if visible is None else visible & dense
        return visible

    def bias(self, block: Block, part: Part) -> Tensor | None:
        """Return the bias of a part, broadcastable to ``(batch, heads, n, m)``, or None without a bias."""
        attention = self._attention
        device = attention.query.device
        q = torch.arange(block.q_start, block.q_stop, device=device) if block.queries is None else block.queries
        kv = torch.arange(part.kv_start, part.kv_stop, device=device)
        if part.keys is not None and attention.segments[part.segment].bias is not None:
            raise NotImplementedError("got a bias with gathered keys, which a backend must refuse (Backend.refusals)")
        return attention.segments[part.segment].bias_at(q, kv, attention.q_len)

    def key(self, block: Block, part: Part) -> tuple[object, ...] | None:
        """Return a cache key for the pattern mask and the bias of a part, or None if they cannot be reused.

        Parts with equal cache keys have equal pattern masks and equal biases.
        """
        segment, tile = self._attention.segments[part.segment], self._tile(block, part)
        by_pattern: tuple[object, ...] | None = ("all", block.rows, part.kv_stop - part.kv_start)
        if not segment.pattern.sees_all(tile):
            by_pattern = segment.pattern.block_key(tile)
        by_bias = () if segment.bias is None else segment.bias.block_key(tile)
        return None if by_pattern is None or by_bias is None else (by_pattern, by_bias)


def _may_hide(mask: Tensor) -> bool:
    """Whether a mask may hide a key. On a GPU, the result is always True, because reading the mask would be slow."""
    return mask.device.type != "cpu" or not holds(mask.all(), unknown=False)


def visible_rows(attention: Attention) -> Tensor:
    """Return bool ``(batch, heads or 1, q_len)``, True for queries that see a key.

    The attention must have no pattern that reorders the queries.
    """
    masks, all_rows = Masks(attention), []
    for block in blocks(attention, list(range(len(attention.segments))), block_size(attention)):
        visible = attention.query.new_zeros((attention.batch, 1, block.rows), dtype=torch.bool)
        for part in block.parts:
            mask = masks.of(block, part)
            visible = torch.ones_like(visible) if mask is None else visible | mask.any(-1)
        all_rows.append(visible)
    heads = max(visible.shape[1] for visible in all_rows)
    return torch.cat([visible.expand(-1, heads, -1) for visible in all_rows], dim=2)


def additive(visible: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return bias plus mask as one additive mask with ``-inf`` at hidden keys, or None if both are None."""
    if visible is None:
        return None if bias is None else bias.to(dtype)
    if bias is None:
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))
    return bias.to(dtype).masked_fill(~visible, float("-inf"))
