"""Attention weights in the layout Reformer returns: chunk by chunk of the sorted list, and rounds each on their own.

``weights`` are dense, as a backend gives them: per segment ``(batch, heads, length, keys)``, queries in their own order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_chunks(weights: tuple[Tensor, ...], chunk: int, ahead: list[int]) -> Tensor:
    """Dense weights as ``(batch, heads, chunks, chunk, len(ahead) * chunk)``: per chunk, its neighbourhood.

    Args:
        weights: one tensor ``(batch, heads, n, n)`` for all neighbours, or one for each.
        chunk: tokens per chunk.
        ahead: how many chunks ahead each neighbour is.
    """
    batch, heads, length, _ = weights[0].shape
    starts = torch.arange(0, length, chunk, device=weights[0].device)
    within = torch.arange(chunk, device=weights[0].device)
    found = []
    for number, step in enumerate(ahead):
        dense = weights[number if len(weights) > 1 else 0].unflatten(2, (-1, chunk))
        keys = (starts[:, None] + step * chunk + within) % length  # (chunks, chunk)
        found.append(dense.gather(4, keys[:, None].expand(batch, heads, -1, chunk, -1)))
    return torch.cat(found, dim=-1)


def with_own_token(weights: Tensor, share: Tensor, own: Tensor) -> Tensor:
    """Weights over their share; rows without a share see nothing but themselves: their weight is on their own token.

    Args:
        weights: ``(..., n)``.
        share: ``(..., 1)``, what they would sum to if none were dropped.
        own: bool, broadcastable to ``weights``, True where the key is the query's own token, however often.
    """
    alone = share == 0.0
    itself = own / own.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(alone, itself.to(weights.dtype), weights / share.masked_fill(alone, 1.0))


def of_rounds(
    probabilities: tuple[Tensor, ...], dropped: tuple[Tensor, ...], order: Tensor, chunk: int, ahead: list[int]
) -> Tensor:
    """Weights of all rounds as ``(batch, heads, hashes * length / chunk, chunk, len(ahead) * chunk)``, in sorted order.

    Args:
        probabilities: per round and neighbour (or round alone) ``(batch, heads, length, hashes * length)``.
        dropped: the same after dropout.
        order: ``(batch, heads, hashes, length)``: the token at each place of each round.
        chunk, ahead: as for :func:`in_chunks`.
    """
    hashes = order.shape[2]
    per_round = len(dropped) // hashes
    rounds = [slice(number * per_round, (number + 1) * per_round) for number in range(hashes)]
    tokens = order.flatten(2)

    def sort(weights: Tensor, number: int) -> Tensor:
        return weights.gather(2, order[:, :, number, :, None].expand(-1, -1, -1, weights.shape[3]))

    shares = [sum(part.sum(-1, keepdim=True) for part in probabilities[one]) for one in rounds]
    lists = [
        torch.cat([sort(dropped[one][neighbour], number) for number, one in enumerate(rounds)], dim=2)
        for neighbour in range(per_round)
    ]
    share = torch.cat([sort(torch.as_tensor(part), number) for number, part in enumerate(shares)], dim=2)
    own = in_chunks((tokens[..., None] == tokens[:, :, None],), chunk, ahead)
    return with_own_token(in_chunks(tuple(lists), chunk, ahead), share.unflatten(2, (-1, chunk)), own)
