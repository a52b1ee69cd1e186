"""Compute LongT5's relative bias for each distance, from the learned tables or from the original code's bias tensor.

The original encoder passes a bias tensor from layer to layer. This tensor is split into blocks
(:func:`~attnzoo.adapters.longt5_blocks.to_blocked`), and already contains the mask. If the first layer runs the
original code, a patched layer gets this tensor. The patched layer then reads the bias of each distance from one entry
of the tensor. This is differentiable, so gradients reach the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import parameter_of
from attnzoo.adapters.longt5_blocks import GlobalBlocks
from attnzoo.errors import PatchError

TABLE, SIDE_TABLE = "relative_attention_bias", "global_relative_attention_bias"


def local_reach(module: Any) -> int:
    """Return how many tokens an encoder token sees on each side."""
    return int(module.block_len) - 1


def side_reach(module: Any) -> int:
    """Return ``relative_attention_max_distance``. All larger distances have the same bias as this distance."""
    return int(module.relative_attention_max_distance)


def check_buckets(module: Any) -> None:
    """Raise if T5's formula for buckets of distances does not work with the config of the module.

    In each direction, the formula gives a separate bucket to each of the ``exact`` smallest distances. ``exact`` must
    be from 1 to ``side_reach(module) - 1``.
    """
    buckets, reach = int(module.relative_attention_num_buckets), side_reach(module)
    exact = buckets // (2 if module.is_decoder else 4)
    if not 0 < exact < reach:
        raise PatchError(
            f"config: got relative_attention_num_buckets={buckets}, relative_attention_max_distance={reach}; "
            f"allowed: at least {2 if module.is_decoder else 4} buckets, and a maximum distance above {exact}"
        )


def trains_bias(module: Any, *tables: str) -> bool:
    """Whether the module has tables of learned biases, and at least one of those named in ``tables`` requires grad."""
    trained = (getattr(module, table).weight.requires_grad for table in tables)
    return bool(module.has_relative_attention_bias) and any(trained)


def values_by_distance(module: Any, table: str, reach: int) -> Tensor:
    """Return the learned bias of the distances from ``-reach`` to ``reach``, ``(heads, 2 * reach + 1)``."""
    embedding = getattr(module, table)
    distances = torch.arange(-reach, reach + 1, device=parameter_of(embedding).device)
    number, most = module.relative_attention_num_buckets, module.relative_attention_max_distance
    buckets = module._relative_position_bucket(distances, not module.is_decoder, number, most)
    values: Tensor = embedding(buckets).T
    return values


def read_local_bias(blocked: Tensor, real: Tensor, block_len: int) -> Tensor:
    """Return the bias of each distance from ``1 - block_len`` to ``block_len - 1``, ``(heads, 2 * block_len - 1)``.

    ``blocked`` is the original bias tensor, ``(batch, blocks, heads, block_len, 3 * block_len or more)``. ``real`` is
    ``(batch, length)`` bool. This function reads the bias of a distance at one pair of real tokens with this distance.
    If there is no such pair, the bias is 0.
    """
    length = real.shape[1]
    near = min(block_len, length)
    both = [real[:, : length - d] & real[:, d:] for d in range(near)]
    pairs = torch.stack([torch.nn.functional.pad(pair, (0, d)) for d, pair in enumerate(both)]).flatten(1)
    exists, place = pairs.any(1), pairs.byte().argmax(1)
    sample, first = place // length, place % length
    second = first + torch.arange(near, device=real.device)
    ahead = _look_up(blocked, sample, first, second, block_len, exists)
    behind = _look_up(blocked, sample, second, first, block_len, exists)
    values = torch.cat([behind[:, 1:].flip(1), ahead], dim=1)
    return torch.nn.functional.pad(values, (block_len - near, block_len - near))


def _look_up(blocked: Tensor, sample: Tensor, query: Tensor, key: Tensor, block_len: int, exists: Tensor) -> Tensor:
    """Return the bias ``(heads, n)`` of ``n`` pairs of a query and a key. Where ``exists`` is False, return 0."""
    query, key = (torch.where(exists, index, 0) for index in (query, key))
    block = query // block_len
    column = key - (block - 1) * block_len
    return blocked[sample, block, :, query % block_len, column].masked_fill(~exists[:, None], 0.0).T


def read_side_bias(blocked: Tensor, blocks: GlobalBlocks, block_len: int, reach: int) -> Tensor:
    """Return the global segment's bias of the block distances from ``-reach`` to ``reach``, ``(heads, 2 * reach + 1)``.

    The block distance is the index of the key's global block minus the index of the query's global block. ``blocked``
    is the original bias tensor, ``(batch, local blocks, heads, block_len, global blocks)``.
    """
    batch, length = blocks.block_of.shape
    # Find one token of each global block (-1: no token). Then find, for each distance, a pair of a token and a block.
    slots = blocks.block_of.where(blocks.block_of >= 0, blocks.number)
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
