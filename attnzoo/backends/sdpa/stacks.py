"""Stacks of blocks with equal masks, so that one kernel call computes many blocks.

Away from the ends of a sequence, each block of a window sees the same number of keys, at the same distance and under
the same mask, as the block before it. Such blocks are views into the same tensors with a constant step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from attnzoo.backends.common.blocks import Block, Masks, Part, block_at, block_size, blocks
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.segments import Attention

# The CPU kernel computes 32 queries at a time; blocks in a stack can be that small, which wastes the fewest keys.
_TILE = 32
# Queries of one call: what the call reads should stay in the cache.
_ROWS = 1024


class Stack(NamedTuple):
    """A block, and the blocks after it that have the same masks.

    A stack of several blocks is of one sample, and its call has the heads in place of samples and the blocks in place
    of heads. A single block is of the whole batch.
    """

    block: Block  # the first
    depth: int  # the number of blocks
    steps: tuple[int, ...]  # by how many keys each part moves from one block to the next
    sample: int | None = None  # None: all

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.block.parts

    def whole(self) -> Block:
        """Return all queries as one block without parts."""
        return self.block._replace(q_stop=self.block.q_start + self.depth * self.block.rows, parts=())

    def can_grow(self, steps: tuple[int, ...]) -> bool:
        """Return whether a further block with these steps fits."""
        return (self.depth + 1) * self.block.rows <= _ROWS and (self.depth == 1 or steps == self.steps)

    def by_sample(self, batch: int) -> Iterator[Stack]:
        """Yield the stack of each sample; a single block is one stack of the whole batch."""
        if self.depth == 1:
            yield self
        else:
            yield from (self._replace(sample=sample) for sample in range(batch))

    def flat(self) -> Stack:
        """Return the stack as a single block, for parts that do not move and need no mask."""
        return self._replace(block=self.whole()._replace(parts=self.block.parts), depth=1)

    def take(self, tensor: Tensor) -> Tensor:
        """Return the rows of ``(batch, heads, q_len, ...)`` as ``(heads, depth, rows, ...)``, or a single block's."""
        return self.by_block(self.whole().take(self._of_sample(tensor)))

    def put(self, tensor: Tensor, values: Tensor) -> None:
        if self.depth == 1:
            self.block.put(self._of_sample(tensor), values)
        else:
            self.take(tensor).copy_(values)

    def _of_sample(self, tensor: Tensor) -> Tensor:
        return tensor if self.sample is None else tensor[self.sample : self.sample + 1]

    def by_block(self, rows: Tensor) -> Tensor:
        """View ``(1, heads, depth * rows, ...)`` as ``(heads, depth, rows, ...)``."""
        return rows if self.depth == 1 else rows[0].unflatten(1, (self.depth, self.block.rows))

    def repeat(self, rows: Tensor) -> Tensor:
        """Return values of one block's rows ``(batch, heads, rows, ...)`` for all blocks."""
        rows = self._of_sample(rows)
        return rows if self.depth == 1 else rows[0][:, None].expand(-1, self.depth, *rows.shape[2:])

    def keys(self, number: int, tensor: Tensor, heads: int, scratch: Scratch) -> Tensor:
        """Return keys or values of part ``number`` as ``(heads, depth, m, dim)``, or a single block's."""
        part, step, tensor = self.block.parts[number], self.steps[number], self._of_sample(tensor)
        if self.depth == 1:
            return part.take(tensor, heads)
        keys = tensor[:, :, part.kv_start : part.kv_stop + (self.depth - 1) * step]
        keys = expand_heads(scratch.contiguous_rows(keys), heads)[0]
        if step == 0:
            return keys[:, None].expand(-1, self.depth, -1, -1)
        return keys.unfold(1, part.kv_stop - part.kv_start, step).transpose(2, 3)


class Scratch:
    """Memory to lay the rows of keys or values side by side; projections leave the rows of a head apart.

    Each block of a stack reads most of the keys of the block before it: side by side, they stay in the cache.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def contiguous_rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of ``(..., n, dim)`` side by side; the result is valid until the next call."""
        if tensor.stride(-2) == tensor.shape[-1]:
            return tensor
        if self._memory is None or self._memory.numel() < tensor.numel():
            self._memory = tensor.new_empty(tensor.numel())  # on the CPU, whatever device is the default
        return self._memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


def stacks(attention: Attention, segments: list[int]) -> Iterator[Stack]:
    """Yield all blocks of one pass, first query first, as stacks."""
    masks = Masks(attention)
    stack: Stack | None = None
    end: Block | None = None  # the last block of the stack
    key: tuple[object, ...] | None = None  # of all its blocks
    for block in blocks(attention, segments, _size(attention, segments, masks)):
        previous, key = key, None if _hides_by_data(masks, block) else _mask_key(masks, block)
        if stack is not None and end is not None:
            steps = _steps(end, block) if key is not None and key == previous else None
            if steps is not None and stack.can_grow(steps):
                stack, end = Stack(stack.block, stack.depth + 1, steps), block
                continue
            yield stack
        stack, end = Stack(block, 1, (0,) * len(block.parts)), block
    if stack is not None:
        yield stack


def _size(attention: Attention, segments: list[int], masks: Masks) -> int:
    """The number of queries per block: smaller than usual if the blocks in the middle then make a stack that moves."""
    size, middle = block_size(attention), attention.q_len // 2
    dense = any(attention.segments[index].mask is not None for index in segments)
    if dense or size <= _TILE or middle + 2 * _TILE > attention.q_len:
        return size
    first, second = (block_at(attention, segments, start, start + _TILE) for start in (middle, middle + _TILE))
    key = _mask_key(masks, first)
    alike = key is not None and key == _mask_key(masks, second)
    return _TILE if alike and any(_steps(first, second) or ()) else size


def _mask_key(masks: Masks, block: Block) -> tuple[object, ...] | None:
    """Equal only for blocks with equal masks by pattern and equal biases; None: unknown."""
    if block.queries is not None or any(part.keys is not None for part in block.parts):
        return None
    keys = [(part.segment, part.kv_stop - part.kv_start, masks.key(block, part)) for part in block.parts]
    return None if any(key is None for *_, key in keys) else (block.rows, *keys)


def _steps(block: Block, following: Block) -> tuple[int, ...] | None:
    """By how many keys each part moves to the next block; None if a part moves back."""
    steps = tuple(b.kv_start - a.kv_start for a, b in zip(block.parts, following.parts, strict=True))
    return steps if min(steps, default=0) >= 0 else None


def _hides_by_data(masks: Masks, block: Block) -> bool:
    """Whether a key mask or dense mask hides a key of the block."""
    return any(masks.of_keys(block, part) is not None for part in block.parts)
