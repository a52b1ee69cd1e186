"""The relative biases of LongT5 as values by distance: made from the learned tables, or read out of the model's own.

The model's own encoder passes a blocked tensor from layer to layer, mask and all. A patched layer gets it when the
first layer runs the model's code; then the values are looked up in it, and gradients flow on through it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.adapter import parameter_of
from attnzoo.errors import PatchError


class Globals(NamedTuple):
    """The blocks of a batch that have a key of their own.

    Attributes:
        of: ``(batch, length)`` long, the block of each token; -1 where it has none.
        exists: ``(batch, blocks)`` bool.
        mask: the same as a mask: None if all exist.
    """

    of: Tensor
    exists: Tensor
    mask: Tensor | None

    @property
    def number(self) -> int:
        """How many blocks the longest possible sample has."""
        return self.exists.shape[1]


def local_reach(module: Any) -> int:
    """How far an encoder token looks."""
    return int(module.block_len) - 1


def side_reach(module: Any) -> int:
    """The distance beyond which every distance falls into the last bucket."""
    return int(module.relative_attention_max_distance)


def check_buckets(module: Any) -> None:
    """Raise unless the last bucket begins before :func:`side_reach`, as the bucket function is meant to be used."""
    buckets, reach = int(module.relative_attention_num_buckets), side_reach(module)
    exact = buckets // (2 if module.is_decoder else 4)
    if not 0 < exact < reach:
        raise PatchError(
            f"config: got relative_attention_num_buckets={buckets}, relative_attention_max_distance={reach}; "
            "allowed: at least 4 buckets, and a distance beyond the buckets of one distance each"
        )


def trains_bias(module: Any, *tables: str) -> bool:
    """Whether the module has the tables, and they are not all frozen."""
    trained = (getattr(module, table).weight.requires_grad for table in tables)
    return bool(module.has_relative_attention_bias) and any(trained)


def bucketed(module: Any, table: str, reach: int) -> Tensor:
    """``(heads, 2 * reach + 1)``: what the module's learned table holds for the distances ``-reach .. reach``."""
    embedding = getattr(module, table)
    distances = torch.arange(-reach, reach + 1, device=parameter_of(embedding).device)
    buckets = module._relative_position_bucket(
        distances,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    values: Tensor = embedding(buckets).T
    return values


def read_local(blocked: Tensor, real: Tensor, block_len: int) -> Tensor:
    """``(heads, 2 * block_len - 1)`` from ``(batch, blocks, heads, block_len, 3 * block_len or more)``.

    For each distance, one pair of real tokens is found and looked up; where there is none, nobody asks for the value.
    """
    length = real.shape[1]
    near = min(block_len, length)
    both = [real[:, : length - d] & real[:, d:] for d in range(near)]
    pairs = torch.stack([torch.nn.functional.pad(pair, (0, d)) for d, pair in enumerate(both)]).flatten(1)
    found, at = pairs.any(1), pairs.byte().argmax(1)
    sample, first = at // length, at % length
    second = first + torch.arange(near, device=real.device)
    ahead = _look_up(blocked, sample, first, second, block_len, found)
    behind = _look_up(blocked, sample, second, first, block_len, found)
    values = torch.cat([behind[:, 1:].flip(1), ahead], dim=1)
    return torch.nn.functional.pad(values, (block_len - near, block_len - near))


def _look_up(blocked: Tensor, sample: Tensor, query: Tensor, key: Tensor, block_len: int, found: Tensor) -> Tensor:
    """``(heads, n)``: what a blocked bias adds for pairs of tokens ``(n,)``; 0 where no pair was found."""
    query, key = (torch.where(found, index, 0) for index in (query, key))
    block = query // block_len
    column = key - (block - 1) * block_len
    return blocked[sample, block, :, query % block_len, column].masked_fill(~found[:, None], 0.0).T


def read_side(blocked: Tensor, blocks: Globals, block_len: int, reach: int) -> Tensor:
    """``(heads, 2 * reach + 1)`` from ``(batch, blocks of tokens, heads, block_len, globals)``."""
    batch, length = blocks.of.shape
    # A token of each block (-1: none), then every such token with every block that exists, one of them per distance.
    slots = blocks.of.where(blocks.of >= 0, blocks.number)
    token = slots.new_full((batch, blocks.number + 1), -1)
    token = token.scatter(1, slots, _numbers(slots, length).expand(batch, -1))[:, :-1]
    sample, block, key = ((token >= 0)[:, :, None] & blocks.exists[:, None]).nonzero(as_tuple=True)
    distance = (key - block).clamp(-reach, reach) + reach
    pair = distance.new_full((2 * reach + 1,), -1).scatter(0, distance, _numbers(distance, len(distance)))
    values = blocked.new_zeros((2 * reach + 1, blocked.shape[2]))
    known = (pair >= 0).nonzero()[:, 0]
    sample, block, key = (index[pair[known]] for index in (sample, block, key))
    query = token[sample, block]
    return values.index_put((known,), blocked[sample, query // block_len, :, query % block_len, key]).T


def _numbers(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device)
