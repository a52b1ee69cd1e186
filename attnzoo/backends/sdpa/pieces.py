"""Join the keys, values, masks and biases of a block's parts, in a form that autograd differentiates fast."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnzoo.backends.common.blocks import Block, Masks, Part
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.segments import Attention


class KeyPieces:
    """Keys and values of a segment, cut wherever a part of any block begins or ends.

    If each block took a slice, autograd would add up one gradient of whole length per block. The gradient of a piece is
    as long as the piece.
    """

    def __init__(self, attention: Attention, index: int, all_blocks: list[Block]) -> None:
        segment = attention.segments[index]
        parts = [part for block in all_blocks for part in block.parts if part.segment == index]
        gathered = {id(part.keys): part.keys for part in parts if part.keys is not None}
        self._numbers = {key: number for number, key in enumerate(gathered)}
        if gathered:  # all at once, for one gradient of whole length; each block keeps its copy for the backward anyway
            keys = torch.cat(list(gathered.values()), dim=2)
            whole, widths = Part(index, 0, keys.shape[2], keys), [keys.shape[2] for keys in gathered.values()]
            self._keys = whole.take(segment.key, attention.heads).split(widths, dim=2)
            self._values = whole.take(segment.value, attention.heads).split(widths, dim=2)
            return
        self._cuts = sorted({0, segment.kv_len, *(p.kv_start for p in parts), *(p.kv_stop for p in parts)})
        sizes = [stop - start for start, stop in zip(self._cuts, self._cuts[1:], strict=False)]
        self._keys = expand_heads(segment.key, attention.heads).split(sizes, dim=2)
        self._values = expand_heads(segment.value, attention.heads).split(sizes, dim=2)

    def key(self, part: Part) -> Tensor:
        """Return the keys of a part for all heads."""
        return self._join(part, self._keys)

    def value(self, part: Part) -> Tensor:
        """Return the values of a part for all heads."""
        return self._join(part, self._values)

    def _join(self, part: Part, pieces: tuple[Tensor, ...]) -> Tensor:
        if part.keys is not None:
            return pieces[self._numbers[id(part.keys)]]
        return torch.cat(pieces[self._cuts.index(part.kv_start) : self._cuts.index(part.kv_stop)], dim=2)


def join_parts(pieces: Mapping[int, KeyPieces], block: Block) -> tuple[Tensor, Tensor]:
    """Concatenate the keys, and the values, of all parts of a block."""
    key = torch.cat([pieces[part.segment].key(part) for part in block.parts], dim=2)
    return key, torch.cat([pieces[part.segment].value(part) for part in block.parts], dim=2)


def join_masks(attention: Attention, masks: Masks, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """Concatenate the masks, and the biases, of all parts of a block; None if no part has one."""
    visible = [masks.of(block, part) for part in block.parts]
    bias = [masks.bias(block, part) for part in block.parts]
    batch, heads, query = attention.batch, attention.heads, attention.query
    widths = [part.kv_stop - part.kv_start for part in block.parts]
    joined_visible = joined_bias = None
    if any(mask is not None for mask in visible):
        mask_heads = max(1 if mask is None else mask.visible.shape[1] for mask in visible)
        everything = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=query.device)
        expanded = [
            (everything if mask is None else mask.visible).expand(batch, mask_heads, block.rows, width)
            for mask, width in zip(visible, widths, strict=True)
        ]
        joined_visible = torch.cat(expanded, dim=-1)
    if any(term is not None for term in bias):
        expanded = [
            (query.new_zeros((1, 1, 1, 1)) if term is None else term.to(query.dtype)).expand(
                batch, heads, block.rows, width
            )
            for term, width in zip(bias, widths, strict=True)
        ]
        joined_bias = torch.cat(expanded, dim=-1)
    return joined_visible, joined_bias
