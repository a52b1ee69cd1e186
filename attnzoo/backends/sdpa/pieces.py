"""Join the keys, values, masks and biases of all parts of a block, by operations with a fast backward."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from attnzoo.backends.common.blocks import Block, Masks, Part
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.segments import Attention


class KeyPieces:
    """Keys and values of a segment, cut wherever a part of any block begins or ends.

    If each block sliced the whole tensor, the gradient of each slice would be as long as the whole tensor, and autograd
    would add all these gradients. The gradient of a piece is only as long as the piece.
    """

    def __init__(self, attention: Attention, index: int, all_blocks: list[Block]) -> None:
        segment = attention.segments[index]
        parts = [part for block in all_blocks for part in block.parts if part.segment == index]
        gathered = {id(part.keys): part.keys for part in parts if part.keys is not None}
        self._numbers = {key: number for number, key in enumerate(gathered)}
        if gathered:  # one gather for all blocks makes a single gradient of full length
            keys = torch.cat(list(gathered.values()), dim=2)
            whole, sizes = Part(index, 0, keys.shape[2], keys), [keys.shape[2] for keys in gathered.values()]
            tensors = [whole.take(tensor, attention.heads) for tensor in (segment.key, segment.value)]
        else:
            self._cuts = sorted({0, segment.kv_len, *(p.kv_start for p in parts), *(p.kv_stop for p in parts)})
            sizes = [stop - start for start, stop in pairwise(self._cuts)]
            tensors = [expand_heads(tensor, attention.heads) for tensor in (segment.key, segment.value)]
        self._pieces = [tensor.split(sizes, dim=2) for tensor in tensors]

    def of(self, part: Part) -> list[Tensor]:
        """Return the keys and the values of a part, each ``(batch, heads, m, dim)``."""
        if part.keys is not None:
            number = self._numbers[id(part.keys)]
            return [pieces[number] for pieces in self._pieces]
        numbers = slice(self._cuts.index(part.kv_start), self._cuts.index(part.kv_stop))
        return [torch.cat(pieces[numbers], dim=2) for pieces in self._pieces]


def join_parts(pieces: Mapping[int, KeyPieces], block: Block) -> tuple[Tensor, Tensor]:
    """Return the concatenated keys and the concatenated values of all parts of a block."""
    keys, values = zip(*(pieces[part.segment].of(part) for part in block.parts), strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def join_masks(attention: Attention, masks: Masks, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """Return the joined masks and the joined biases of all parts. Each is None if no part has any."""
    query = attention.query

    def join(terms: list[Tensor | None], neutral: Tensor, heads: int) -> Tensor | None:
        if all(term is None for term in terms):
            return None
        expanded = [
            (neutral if term is None else term.to(neutral.dtype)).expand(
                attention.batch, heads, block.rows, part.kv_stop - part.kv_start
            )
            for term, part in zip(terms, block.parts, strict=True)
        ]
        return torch.cat(expanded, dim=-1)

    visible = [masks.of(block, part) for part in block.parts]
    mask_heads = max(1 if mask is None else mask.shape[1] for mask in visible)
    everything = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=query.device)
    bias = [masks.bias(block, part) for part in block.parts]
    return join(visible, everything, mask_heads), join(bias, query.new_zeros((1, 1, 1, 1)), attention.heads)
