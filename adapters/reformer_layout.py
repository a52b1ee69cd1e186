"""What Reformer's two kinds of attention share: heads, padding, neighbourhoods of chunks, and weights in its layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend
from attnzoo.errors import InvalidArgumentError
from attnzoo.patching.mask_arguments import check_mask, refuse_nan
from attnzoo.spec.transforms import holds

MODULE = "transformers.models.reformer.modeling_reformer"


def where_real(attention_mask: Tensor) -> Tensor | None:
    """Where a mask is not 0; None: everywhere."""
    refuse_nan("attention_mask", attention_mask)
    found = attention_mask.bool()
    return None if holds(found.all(), unknown=False) else found


def real_tokens(attend: Attend, attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Which tokens are not padding, by a mask ``(batch, length)`` of 0 and 1; None: all of them."""
    if attention_mask is None:
        return None
    return attend.cached_per_forward(
        check_mask("attention_mask", attention_mask, batch, length, None), "real", where_real
    )


def cached(module: Any, past_buckets_states: Any, batch: int) -> tuple[Tensor, Tensor] | None:
    """The buckets and the states ``(batch, length, embed)`` a cache has of a module's tokens; None: it has none yet."""
    if past_buckets_states is None or len(past_buckets_states) <= module.layer_idx:
        return None
    buckets, states = (
        every[module.layer_idx] for every in (past_buckets_states.buckets_cache, past_buckets_states.states_cache)
    )
    if states.shape[0] != batch:
        raise InvalidArgumentError("hidden_states", f"{batch} samples", f"{states.shape[0]}, as past_buckets_states")
    return buckets, states


def check_length(module: Any, length: int, copies: int = 1) -> int:
    """The number of chunks of the whole list."""
    if length * copies % module.chunk_length:
        raise InvalidArgumentError(
            "hidden_states", f"{length} tokens", f"a multiple of the chunk length {module.chunk_length}"
        )
    return length * copies // module.chunk_length


def steps_ahead(module: Any, count: int) -> list[int]:
    """How many chunks ahead of a query's own each chunk of its neighbourhood stands, one of ``count`` chunks in all.

    The model rotates its chunks by slicing, so that a rotation by more than ``count`` is none.
    """
    steps = range(-module.num_chunks_before, module.num_chunks_after + 1)
    return [step if abs(step) < count else 0 for step in steps]


def neighbourhoods(module: Any, count: int) -> list[tuple[int, int]]:
    """``(before, after)`` per segment, for all chunks of a neighbourhood together or, if any comes twice, for each.

    Where the neighbourhood is longer than the list, the model counts the same chunk several times over.
    """
    before, after = module.num_chunks_before, module.num_chunks_after
    if before + after < count:
        return [(before, after)]
    return [(-ahead, ahead) for ahead in steps_ahead(module, count)]


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
