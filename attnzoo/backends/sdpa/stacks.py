"""Stacks of blocks with equal masks. One kernel call computes all blocks of a stack.

For a window pattern, all blocks except those near the ends of a sequence have equal masks, equal numbers of keys and
equal distances between queries and keys. From one such block to the next, the first key moves by a constant *step*. For
example, blocks of 32 queries with ``Window(8, 8)`` see the keys 24:72, 56:104, 88:136 and so on, with step 32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from attnzoo.backends.common.blocks import Block, Masks, Part, block_at, block_size
from attnzoo.backends.sdpa.part_masks import PartMasks
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import Tile
from attnzoo.spec.segments import Attention

# The CPU kernel computes 32 queries at a time. Blocks of 32 queries compute the fewest hidden keys.
_TILE = 32
# The largest number of queries per call. The data of one call should fit the CPU cache.
_ROWS = 1024
# The kernel is fastest if the number of keys is a multiple of this number: 288 keys take less time than 286.
_ALIGNMENT = 16
# Keys are copied (see Scratch) only if more blocks than this read them. With fewer blocks, a copy takes more time than
# it saves.
_READS = 16


class Stack(NamedTuple):
    """``depth`` consecutive blocks with equal masks.

    A stack of several blocks belongs to one sample. The kernel call then has the heads in the batch dimension and the
    blocks in the head dimension. A stack of a single block covers the whole batch.
    """

    block: Block  # the first block
    depth: int  # the number of blocks
    steps: tuple[int, ...]  # per part: how many keys later the part begins in the next block
    sample: int | None = None  # None: the whole batch

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.block.parts

    def whole(self) -> Block:
        """Return one block that contains all queries of the stack and no parts."""
        return self.block._replace(q_stop=self.block.q_start + self.depth * self.block.rows, parts=())

    def by_sample(self, batch: int) -> Iterator[Stack]:
        """Yield one stack per sample, or only this stack if it consists of a single block."""
        if self.depth == 1:
            yield self
        else:
            yield from (self._replace(sample=sample) for sample in range(batch))

    def flat(self) -> Stack:
        """Return a stack of depth 1 whose block has all queries, with the keys of the first block.

        The result is correct only for parts with step 0 and without an additive mask.
        """
        return self._replace(block=self.whole()._replace(parts=self.block.parts), depth=1)

    def take(self, tensor: Tensor) -> Tensor:
        """Return the query rows: ``(heads, depth, rows, ...)``, or ``(batch, heads, rows, ...)`` if depth is 1.

        ``tensor`` is ``(batch, heads, q_len)`` or ``(batch, heads, q_len, dim)``.
        """
        return self.by_block(self.whole().take(self._of_sample(tensor)))

    def put(self, tensor: Tensor, values: Tensor) -> None:
        if self.depth == 1:
            self.block.put(self._of_sample(tensor), values)
        else:
            self.take(tensor).copy_(values)

    def _of_sample(self, tensor: Tensor) -> Tensor:
        return tensor if self.sample is None else tensor[self.sample : self.sample + 1]

    def by_block(self, rows: Tensor) -> Tensor:
        """Return ``(1, heads, depth * rows, ...)`` as ``(heads, depth, rows, ...)``, or unchanged if depth is 1."""
        return rows if self.depth == 1 else rows[0].unflatten(1, (self.depth, self.block.rows))

    def repeat(self, rows: Tensor) -> Tensor:
        """Repeat a tensor ``(batch, heads, rows, ...)`` of the first block, such as a mask, for all blocks.

        The result has the dimensions of :meth:`take`.
        """
        rows = self._of_sample(rows)
        return rows if self.depth == 1 else rows[0][:, None].expand(-1, self.depth, *rows.shape[2:])

    def keys(self, number: int, tensor: Tensor, heads: int, scratch: Scratch) -> Tensor:
        """Return the keys or values of part ``number`` of all blocks.

        ``tensor`` has all keys or values, ``(batch, kv_heads, kv_len, dim)``.
        The result is ``(heads, depth, m, dim)``, or ``(batch, heads, m, dim)`` if depth is 1.
        """
        part, step, tensor = self.block.parts[number], self.steps[number], self._of_sample(tensor)
        if self.depth == 1:
            return part.take(tensor, heads)
        keys = tensor[:, :, part.kv_start : part.kv_stop + (self.depth - 1) * step]
        if part.kv_stop - part.kv_start > _READS * step:
            keys = scratch.contiguous_rows(keys)
        keys = expand_heads(keys, heads)[0]
        if step == 0:
            return keys[:, None].expand(-1, self.depth, -1, -1)
        return keys.unfold(1, part.kv_stop - part.kv_start, step).transpose(2, 3)

    def mask(self, masks: PartMasks, number: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the additive mask of part ``number`` (None: no mask), and which queries see a key (None: all).

        The results have the dimensions of :meth:`take`.
        """
        mask, visible_rows = masks.of(self.block, self.parts[number])
        return (
            None if mask is None else self.repeat(mask),
            None if visible_rows is None else self.repeat(visible_rows),
        )


class Scratch:
    """Reusable memory for contiguous copies of keys or values.

    Models store all heads of a token together, so the rows of one head are not contiguous. The blocks of a stack read
    mostly the same keys. In a contiguous copy, these keys stay in the CPU cache.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def contiguous_rows(self, tensor: Tensor) -> Tensor:
        """Return the tensor ``(..., n, dim)`` with contiguous rows. The next call may overwrite the result."""
        if tensor.stride(-2) == tensor.shape[-1]:
            return tensor
        if self._memory is None or self._memory.numel() < tensor.numel():
            self._memory = tensor.new_empty(tensor.numel())  # new_empty ignores the default device
        return self._memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


def stacks(attention: Attention, segments: list[int]) -> Iterator[Stack]:
    """Yield all blocks of one pass in ascending order, grouped into stacks."""
    masks = Masks(attention)
    size, start = _size(attention, segments, masks), 0
    while start < attention.q_len:
        first = _block(attention, segments, start, size)
        run = _Run(attention, segments, masks, first)
        depth = run.depth()
        yield Stack(first, depth, run.steps if depth > 1 else (0,) * len(first.parts))
        start += depth * first.rows


class _Run:
    """The blocks from ``first`` on that form a stack."""

    def __init__(self, attention: Attention, segments: list[int], masks: Masks, first: Block) -> None:
        self._attention, self._segments, self._masks, self._first = attention, segments, masks, first
        self._key = None if _hides_by_data(masks, first) else _mask_key(masks, first)
        self.steps: tuple[int, ...] = ()

    def depth(self) -> int:
        """Return the number of blocks."""
        most = min(_ROWS, self._attention.q_len - self._first.q_start) // self._first.rows
        if most < 2 or self._key is None or (steps := _steps(self._first, self._member(2))) is None:
            return 1
        self.steps = steps
        if self._are_bands() and self._can_have(most):  # the usual case: no search
            return most
        if not self._are_bands():
            return next((depth for depth in range(1, most) if not self._can_have(depth + 1)), most)
        fits, fails = 1, most
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self._can_have(middle) else (fits, middle)
        return fits

    def _are_bands(self) -> bool:
        """Whether all patterns are bands.

        The parts of a band move by a constant step and stop moving at the ends of the keys. So if the last block of a
        stack continues the first block, then all blocks between them do.
        """
        lengths = ((index, self._attention.segments[index].kv_len) for index in self._segments)
        patterns = ((self._attention.segments[index].pattern, kv_len) for index, kv_len in lengths)
        return all(pattern.band(self._attention.q_len, kv_len) is not None for pattern, kv_len in patterns)

    def _can_have(self, depth: int) -> bool:
        """Whether block number ``depth`` continues the first block, and no data hides a key that the stack sees."""
        last = self._member(depth)
        if _mask_key(self._masks, last) != self._key:
            return False
        moved = tuple(step * (depth - 1) for step in self.steps)
        spans = zip(self._first.parts, last.parts, strict=True)
        whole = self._first._replace(parts=tuple(a._replace(kv_stop=b.kv_stop) for a, b in spans))
        return _steps(self._first, last) == moved and not _hides_by_data(self._masks, whole)

    def _member(self, number: int) -> Block:
        rows = self._first.rows
        return _block(self._attention, self._segments, self._first.q_start + (number - 1) * rows, rows)


def _block(attention: Attention, segments: list[int], q_start: int, size: int) -> Block:
    """Return the block of at most ``size`` queries from ``q_start``, with parts as in :func:`_aligned`."""
    block = block_at(attention, segments, q_start, min(attention.q_len, q_start + size))
    alone = Counter(part.segment for part in block.parts)
    parts = (_aligned(attention, block, part) if alone[part.segment] == 1 else part for part in block.parts)
    return block._replace(parts=tuple(parts))


def _aligned(attention: Attention, block: Block, part: Part) -> Part:
    """Return the part, extended to a multiple of ``_ALIGNMENT`` keys if the part needs a mask.

    The part must contain all keys that the block sees in the segment. So the pattern hides the additional keys.
    """
    kv_len = attention.segments[part.segment].kv_len
    tile = Tile(block.q_start, block.q_stop, part.kv_start, part.kv_stop, attention.q_len, kv_len)
    missing = -(part.kv_stop - part.kv_start) % _ALIGNMENT
    if part.keys is not None or part.kv_start == part.kv_stop or missing == 0:
        return part
    if attention.segments[part.segment].pattern.sees_all(tile):
        return part
    if part.kv_stop + missing <= kv_len:
        return part._replace(kv_stop=part.kv_stop + missing)
    return part._replace(kv_start=part.kv_start - missing) if part.kv_start >= missing else part


def _size(attention: Attention, segments: list[int], masks: Masks) -> int:
    """Return the number of queries per block.

    The number is ``_TILE`` if blocks of this size form stacks with a step above 0, else ``block_size()``.
    """
    size, middle = block_size(attention), attention.q_len // 2
    dense = any(attention.segments[index].mask is not None for index in segments)
    if dense or size <= _TILE or size == attention.q_len or middle + 2 * _TILE > attention.q_len:
        return size
    first, second = (_block(attention, segments, start, _TILE) for start in (middle, middle + _TILE))
    key = _mask_key(masks, first)
    alike = key is not None and key == _mask_key(masks, second)
    return _TILE if alike and any(_steps(first, second) or ()) else size


def _mask_key(masks: Masks, block: Block) -> tuple[object, ...] | None:
    """Return a cache key, or None if the block joins no stack.

    Blocks with equal cache keys have equal pattern masks and biases.
    """
    if block.queries is not None or any(part.keys is not None for part in block.parts):
        return None
    keys = [(part.segment, part.kv_stop - part.kv_start, masks.key(block, part)) for part in block.parts]
    return None if any(key is None for *_, key in keys) else (block.rows, *keys)


def _steps(block: Block, following: Block) -> tuple[int, ...] | None:
    """Return by how many keys each part moves from ``block`` to ``following``, or None if a part moves backward."""
    if len(block.parts) != len(following.parts):
        return None
    steps = tuple(b.kv_start - a.kv_start for a, b in zip(block.parts, following.parts, strict=True))
    return steps if min(steps, default=0) >= 0 else None


def _hides_by_data(masks: Masks, block: Block) -> bool:
    """Whether a key mask or dense mask may hide a key in the parts of the block."""
    return any(masks.of_keys(block, part) is not None for part in block.parts)
