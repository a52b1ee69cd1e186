"""Blocks of queries that look alike, stacked, so that one kernel call does many of them.

Away from the ends of a sequence each block of a window sees as many keys, as far away, under the same mask as the
block before it. Such blocks are views into the same tensors, a few rows further on: they can be the batch of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from attnzoo.backends.blocks import Block, Masks, block_at, block_size, blocks
from attnzoo.backends.eager import expand_heads
from attnzoo.segments import Attention

# Blocks in a stack may be small, which wastes fewest keys; the CPU's kernel takes 32 queries at a time.
_TILE = 32
# What one call works on should stay in the cache.
_ROWS = 1024


class Stack(NamedTuple):
    """A block, and how many follow it that look like it.

    Attributes:
        block: the first of them.
        depth: how many there are with it. More than one are of one sample; a single block is of the whole batch.
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
        """Its rows of ``(batch, heads, q_len, dim)``: ``(depth, heads, rows, dim)``, or the single block's."""
        rows = self.whole().take(tensor)
        return rows if self.depth == 1 else _piled(rows, self.depth, self.block.rows, self.block.rows)

    def keys(self, number: int, tensor: Tensor, heads: int) -> Tensor:
        """Keys or values of part ``number``: ``(depth, heads, m, dim)``, or the single block's."""
        part, step = self.block.parts[number], self.steps[number]
        if self.depth == 1:
            return part.take(tensor, heads)
        seen = expand_heads(tensor[:, :, part.kv_start : part.kv_stop + (self.depth - 1) * step], heads)
        return _piled(seen, self.depth, part.kv_stop - part.kv_start, step)

    def pile(self, term: Tensor) -> Tensor:
        """What is added to the scores of each block ``(1, heads, rows, m)``, for all of them."""
        return term if self.depth == 1 else term.expand(self.depth, -1, -1, -1)

    def rows(self, piled: Tensor) -> Tensor:
        """``(depth, heads, rows, ...)`` as rows of the sample, ``(1, heads, depth * rows, ...)``."""
        return piled if self.depth == 1 else piled.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _piled(tensor: Tensor, depth: int, length: int, step: int) -> Tensor:
    """``depth`` overlapping pieces of ``(1, heads, n, dim)``, ``step`` rows apart, one on top of the other: a view."""
    return tensor.expand(depth, -1, -1, -1) if step == 0 else tensor[0].unfold(1, length, step).permute(1, 0, 3, 2)


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
