"""Blocks of queries that look alike, stacked, so that one kernel call does many of them.

Away from the ends of a sequence each block of a window sees as many keys, as far away, under the same mask as the
block before it. Such blocks are views into the same tensors, a few rows further on: they can go in one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from attnzoo.backends.common.blocks import Block, Masks, block_at, block_size, blocks
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.segments import Attention

# Blocks in a stack may be small, which wastes fewest keys; the CPU's kernel takes 32 queries at a time.
_TILE = 32
# What one call works on should stay in the cache.
_ROWS = 1024


class Stack(NamedTuple):
    """A block, and how many follow it that look like it.

    Attributes:
        block: the first of them.
        depth: how many there are with it. More than one are of one sample, and in a call heads are the samples, so that
            a head's blocks follow one another; a single block is of the whole batch.
        steps: for each part of the block, how many keys further on it is in the next block.
    """

    block: Block
    depth: int
    steps: tuple[int, ...]

    def whole(self) -> Block:
        """All its queries as one block, without parts."""
        return self.block._replace(q_stop=self.block.q_start + self.depth * self.block.rows, parts=())

    def grows(self, steps: tuple[int, ...]) -> bool:
        """Whether there is room for a further block, and it moves on as the others do."""
        return (self.depth + 1) * self.block.rows <= _ROWS and (self.depth == 1 or steps == self.steps)

    def samples(self, batch: int) -> list[slice]:
        """The samples to take one by one; a single block takes the whole batch."""
        return [slice(None)] if self.depth == 1 else [slice(sample, sample + 1) for sample in range(batch)]

    def flat(self) -> Stack:
        """The same as one block of many queries: good for parts that do not move and need no mask."""
        return self._replace(block=self.whole()._replace(parts=self.block.parts), depth=1)

    def queries(self, tensor: Tensor) -> Tensor:
        """Its rows of ``(batch, heads, q_len, ...)``: ``(heads, depth, rows, ...)``, or the single block's."""
        return self.pile(self.whole().take(tensor))

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write its rows back."""
        if self.depth == 1:
            self.block.put(tensor, values)
        else:
            self.queries(tensor).copy_(values)

    def pile(self, rows: Tensor) -> Tensor:
        """All its rows ``(1, heads, depth * rows, ...)`` by block, a view: ``(heads, depth, rows, ...)``."""
        return rows if self.depth == 1 else rows[0].unflatten(1, (self.depth, self.block.rows))

    def repeat(self, rows: Tensor) -> Tensor:
        """What is said of each block's rows alike ``(1, heads, rows, ...)``, for all blocks."""
        return rows if self.depth == 1 else rows[0][:, None].expand(-1, self.depth, *rows.shape[2:])

    def keys(self, number: int, tensor: Tensor, heads: int, scratch: Scratch) -> Tensor:
        """Keys or values of part ``number``: ``(heads, depth, m, dim)``, or the single block's."""
        part, step = self.block.parts[number], self.steps[number]
        if self.depth == 1:
            return part.take(tensor, heads)
        seen = tensor[:, :, part.kv_start : part.kv_stop + (self.depth - 1) * step]
        seen = expand_heads(scratch.close(seen), heads)[0]
        if step == 0:
            return seen[:, None].expand(-1, self.depth, -1, -1)
        return seen.unfold(1, part.kv_stop - part.kv_start, step).transpose(2, 3)


class Scratch:
    """Memory for keys or values whose rows lie apart, as projections leave those of a head.

    Each block of a stack reads most of what the one before it did: side by side, it stays in the cache.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def close(self, tensor: Tensor) -> Tensor:
        """The rows of ``(..., n, dim)`` side by side, until the next call."""
        if tensor.stride(-2) == tensor.shape[-1]:
            return tensor
        if self._memory is None or self._memory.numel() < tensor.numel():
            self._memory = tensor.new_empty(tensor.numel())  # on the CPU, whatever device is the default
        return self._memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


def stacks(attention: Attention, segments: list[int]) -> Iterator[Stack]:
    """All blocks of one pass, first query first; neighbours that look alike are together."""
    masks = Masks(attention)
    stack: Stack | None = None
    end: Block | None = None  # the stack's last block
    look: tuple[object, ...] | None = None  # of all its blocks
    for block in blocks(attention, segments, _size(attention, segments, masks)):
        before, look = look, None if _hides(masks, block) else _look(masks, block)
        if stack is not None and end is not None:
            steps = _steps(end, block) if look is not None and look == before else None
            if steps is not None and stack.grows(steps):
                stack, end = Stack(stack.block, stack.depth + 1, steps), block
                continue
            yield stack
        stack, end = Stack(block, 1, (0,) * len(block.parts)), block
    if stack is not None:
        yield stack


def _size(attention: Attention, segments: list[int], masks: Masks) -> int:
    """How many queries to take at once: fewer than usual where blocks in the middle then look alike, and move on."""
    size, middle = block_size(attention), attention.q_len // 2
    dense = any(attention.segments[index].mask is not None for index in segments)
    if dense or size <= _TILE or middle + 2 * _TILE > attention.q_len:
        return size
    first, second = (block_at(attention, segments, start, start + _TILE) for start in (middle, middle + _TILE))
    look = _look(masks, first)
    alike = look is not None and look == _look(masks, second)
    return _TILE if alike and any(_steps(first, second) or ()) else size


def _look(masks: Masks, block: Block) -> tuple[object, ...] | None:
    """Blocks that look equal have equal masks by pattern and equal biases; None: there is no telling."""
    if block.queries is not None or any(part.keys is not None for part in block.parts):
        return None
    looks = [(part.segment, part.kv_stop - part.kv_start, masks.key(block, part)) for part in block.parts]
    return None if any(key is None for *_, key in looks) else (block.rows, *looks)


def _steps(block: Block, following: Block) -> tuple[int, ...] | None:
    """By how many keys each part moves on to the next block; None: not all move forward."""
    steps = tuple(b.kv_start - a.kv_start for a, b in zip(block.parts, following.parts, strict=True))
    return steps if min(steps, default=0) >= 0 else None


def _hides(masks: Masks, block: Block) -> bool:
    """Whether a key mask or dense mask hides any of its keys: data, not structure."""
    return any(masks.of_keys(block, part) is not None for part in block.parts)
