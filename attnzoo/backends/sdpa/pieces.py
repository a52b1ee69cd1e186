"""Keys, values, masks and biases of a block's parts side by side, in ways autograd is quick with."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.backends.common.blocks import Block, Masks, Part
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.segments import Attention


class Pieces:
    """Keys and values of a segment, cut where any block's span begins or ends.

    A slice per block would give autograd a whole-length gradient per block to add up; pieces that blocks share and
    concatenate have gradients of their own size.
    """

    def __init__(self, attention: Attention, index: int, plan: list[Block]) -> None:
        segment = attention.segments[index]
        parts = [part for block in plan for part in block.parts if part.segment == index]
        gathered = {id(part.keys): part.keys for part in parts if part.keys is not None}
        self._numbers = {key: number for number, key in enumerate(gathered)}
        if gathered:  # all at once, for one gradient of whole length; each block keeps its copy for the backward anyway
            keys = torch.cat(list(gathered.values()), dim=2)
            whole, widths = Part(index, 0, keys.shape[2], keys), [one.shape[2] for one in gathered.values()]
            self._keys = whole.take(segment.key, attention.heads).split(widths, dim=2)
            self._values = whole.take(segment.value, attention.heads).split(widths, dim=2)
            return
        self._cuts = sorted({0, segment.kv_len, *(p.kv_start for p in parts), *(p.kv_stop for p in parts)})
        sizes = [stop - start for start, stop in zip(self._cuts, self._cuts[1:], strict=False)]
        self._keys = expand_heads(segment.key, attention.heads).split(sizes, dim=2)
        self._values = expand_heads(segment.value, attention.heads).split(sizes, dim=2)

    def key(self, part: Part) -> Tensor:
        """The keys of a part of the plan, for all heads."""
        return self._of(part, self._keys)

    def value(self, part: Part) -> Tensor:
        """Its values."""
        return self._of(part, self._values)

    def _of(self, part: Part, pieces: tuple[Tensor, ...]) -> Tensor:
        if part.keys is not None:
            return pieces[self._numbers[id(part.keys)]]
        return torch.cat(pieces[self._cuts.index(part.kv_start) : self._cuts.index(part.kv_stop)], dim=2)


def join_masks(attention: Attention, masks: Masks, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """Mask and bias of all parts of a block side by side."""
    seen = [masks.of(block, part) for part in block.parts]
    bias = [masks.bias(block, part) for part in block.parts]
    shape = (attention.batch, attention.heads, block.q_stop - block.q_start)
    widths = [part.kv_stop - part.kv_start for part in block.parts]
    query = attention.query
    joined_seen = joined_bias = None
    if any(mask is not None for mask in seen):
        heads = max(1 if mask is None else mask.seen.shape[1] for mask in seen)
        joined_seen = torch.cat(
            [
                torch.ones((1, 1, 1, 1), dtype=torch.bool, device=query.device).expand(shape[0], heads, shape[2], width)
                if mask is None
                else mask.seen.expand(shape[0], heads, shape[2], width)
                for mask, width in zip(seen, widths, strict=True)
            ],
            dim=-1,
        )
    if any(term is not None for term in bias):
        joined_bias = torch.cat(
            [
                (query.new_zeros((1, 1, 1, 1)) if term is None else term.to(query.dtype)).expand(*shape, width)
                for term, width in zip(bias, widths, strict=True)
            ],
            dim=-1,
        )
    return joined_seen, joined_bias
