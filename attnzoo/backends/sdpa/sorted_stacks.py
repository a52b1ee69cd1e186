"""Stacks of chunks of sorted keys (LSH attention). One kernel call computes all chunks of a stack.

Unlike the blocks of :mod:`attnzoo.backends.sdpa.stacks`, the chunks of a stack have different masks. The masks of all
chunks of a stack are made at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.common.blocks import Block, Part, blocks
from attnzoo.backends.sdpa.part_masks import PartMasks
from attnzoo.backends.sdpa.stacks import Scratch
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.segments import Attention

# The largest number of queries per call, over all samples and heads. With more queries, the masks leave the CPU cache.
_ROWS = 1024


class SortedStack(NamedTuple):
    """``depth`` consecutive blocks of a pass with sorted queries.

    If the depth is above 1, the kernel call has batch and heads in the batch dimension and the blocks in the head
    dimension.
    """

    block: Block  # the first block
    queries: Tensor  # (batch, heads, depth, rows), the indices of all queries
    step: int = 1  # how many keys later the part begins in the next block

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return self.queries.shape[2]

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.block.parts

    def take(self, tensor: Tensor) -> Tensor:
        """Return the query rows ``(batch * heads, depth, rows, ...)``, or ``(batch, heads, rows, ...)`` if depth is 1.

        ``tensor`` is contiguous, ``(batch, heads, q_len)`` or ``(batch, heads, q_len, dim)``.
        """
        rows = tensor.view(-1, *tensor.shape[3:]).index_select(0, self._places(tensor))
        return self._folded(rows.view(*self.queries.shape, *tensor.shape[3:]))

    def put(self, tensor: Tensor, values: Tensor) -> None:
        rows = tensor.view(-1, *tensor.shape[3:])
        rows.index_copy_(0, self._places(tensor), values.to(tensor.dtype).reshape(-1, *tensor.shape[3:]))

    def keys(self, number: int, tensor: Tensor, heads: int, scratch: Scratch) -> Tensor:
        """Return the keys or values of part ``number`` of all blocks, in the dimensions of :meth:`take`."""
        part = self.parts[number]
        if self.depth == 1:
            return part.take(tensor, heads)
        keys = tensor[:, :, part.kv_start : part.kv_stop + (self.depth - 1) * self.step]
        keys = expand_heads(scratch.contiguous_rows(keys), heads).flatten(0, 1)
        return keys.unfold(1, part.kv_stop - part.kv_start, self.step).transpose(2, 3)

    def mask(self, masks: PartMasks, number: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the additive mask of part ``number``, and which queries see a key (None: all), as in :meth:`take`."""
        if self.depth == 1:
            return masks.of(self.block, self.parts[number])
        mask, visible_rows = masks.of_sorted(self.queries, self.parts[number], self.step)
        return self._folded(mask), None if visible_rows is None else self._folded(visible_rows)

    def _folded(self, tensor: Tensor) -> Tensor:
        """Return a tensor ``(batch, heads, depth, ...)`` with the dimensions of :meth:`take`."""
        return tensor.squeeze(2) if self.depth == 1 else tensor.flatten(0, 1)

    def _places(self, tensor: Tensor) -> Tensor:
        """Return the places ``(n,)`` of the queries among the rows of all samples and heads of ``tensor``."""
        batch, heads, q_len = tensor.shape[:3]
        firsts = torch.arange(0, batch * heads * q_len, q_len, device=tensor.device)
        return (self.queries + firsts.view(batch, heads, 1, 1)).flatten()


def sorted_stacks(attention: Attention, index: int) -> Iterator[SortedStack]:
    """Yield all blocks of the pass of one ``SortedChunks`` segment, grouped into stacks."""
    segment = attention.segments[index]
    can_stack = segment.mask is None and segment.key_mask is None  # otherwise a stack would need masks by key
    limit = max(1, _ROWS // (attention.batch * attention.heads))
    run: list[Block] = []
    for block in blocks(attention, [index], attention.q_len):
        if run and not (can_stack and (len(run) + 1) * block.rows <= limit and _continues(run, block)):
            yield _stack(run)
            run = []
        run.append(block)
    yield _stack(run)


def _continues(run: list[Block], block: Block) -> bool:
    """Whether a block can follow the blocks of ``run`` in a stack: equal numbers of queries and keys, equal steps."""
    if not len(block.parts) == len(run[-1].parts) == 1 or block.rows != run[-1].rows:
        return False
    (part,), (last,) = block.parts, run[-1].parts
    step = part.kv_start - last.kv_start
    same_step = len(run) == 1 or step == run[1].parts[0].kv_start - run[0].parts[0].kv_start
    return same_step and step > 0 and part.kv_stop - part.kv_start == last.kv_stop - last.kv_start


def _stack(run: list[Block]) -> SortedStack:
    queries = torch.stack([block.queries for block in run if block.queries is not None], dim=2)
    step = run[1].parts[0].kv_start - run[0].parts[0].kv_start if len(run) > 1 else 1
    return SortedStack(run[0], queries, step)
