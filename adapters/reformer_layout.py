"""Functions for local and LSH attention: padding, caches, neighbourhoods, and the layout of weights.

The *neighbourhood* of a chunk is the chunks that its queries see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend
from attnzoo.errors import InvalidArgumentError
from attnzoo.patching.mask_arguments import check_mask, refuse_nan
from attnzoo.spec.transforms import hides_nothing

MODULE = "transformers.models.reformer.modeling_reformer"


def where_real(attention_mask: Tensor) -> Tensor | None:
    """Return a bool mask that is True where ``attention_mask`` is not 0 (real tokens), or None if no value is 0."""
    refuse_nan("attention_mask", attention_mask)
    real = attention_mask.bool()
    return None if hides_nothing(real) else real


def real_tokens(attend: Attend, attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return a bool mask ``(batch, length)`` that is True for real tokens, or None if no token is padding."""
    if attention_mask is None:
        return None
    checked = check_mask("attention_mask", attention_mask, batch, length, None)
    return attend.cached_per_forward(checked, "real", where_real)


def cached(module: Any, past_buckets_states: Any, batch: int) -> tuple[Tensor, Tensor] | None:
    """Return the cached buckets and states ``(batch, length, embed)`` of a module, or None if its cache is empty."""
    if past_buckets_states is None or len(past_buckets_states) <= module.layer_idx:
        return None
    buckets = past_buckets_states.buckets_cache[module.layer_idx]
    states = past_buckets_states.states_cache[module.layer_idx]
    if states.shape[0] != batch:
        raise InvalidArgumentError("hidden_states", f"{batch} samples", f"{states.shape[0]}, as in past_buckets_states")
    return buckets, states


def check_length(module: Any, length: int, copies: int = 1) -> int:
    """Return the number of chunks in a list of ``copies * length`` tokens. Raise if the last chunk is not full."""
    if length * copies % module.chunk_length:
        allowed = f"a multiple of the chunk length {module.chunk_length}"
        raise InvalidArgumentError("hidden_states", f"{length} tokens", allowed)
    return length * copies // module.chunk_length


def steps_ahead(module: Any, count: int) -> list[int]:
    """Return one number per chunk of a neighbourhood: how many chunks it is after the query's own chunk.

    For example, a neighbourhood of 2 chunks before and 1 chunk after gives [-2, -1, 0, 1]. ``count`` is the number of
    all chunks. For a chunk that would be ``count`` or more chunks away, the original uses the query's own chunk again.
    So with ``count=2``, the example gives [0, -1, 0, 1].
    """
    steps = range(-module.num_chunks_before, module.num_chunks_after + 1)
    return [step if abs(step) < count else 0 for step in steps]


def neighbourhoods(module: Any, count: int) -> list[tuple[int, int]]:
    """Return ``(before, after)`` for each segment: how many chunks a query sees before and after its own chunk.

    ``count`` is the number of all chunks. If a neighbourhood has at most ``count`` chunks, one segment is enough. In
    the original, a larger neighbourhood contains some chunks several times, and the softmax counts them several times.
    So each chunk of a larger neighbourhood gets its own segment. In the segment ``(-n, n)``, a query sees only the
    chunk that is ``n`` chunks after its own chunk. For example, 1 chunk before and 1 after give [(1, 1)] if
    ``count >= 3``, and [(1, -1), (0, 0), (-1, 1)] if ``count == 2``.
    """
    before, after = module.num_chunks_before, module.num_chunks_after
    if before + after < count:
        return [(before, after)]
    return [(-ahead, ahead) for ahead in steps_ahead(module, count)]


def in_chunks(weights: tuple[Tensor, ...], chunk: int, ahead: list[int]) -> Tensor:
    """Return the weights between each chunk and its neighbourhood.

    The result is ``(batch, heads, number of chunks, chunk, len(ahead) * chunk)``. The last two dimensions are the
    queries of a chunk and the keys of its neighbourhood. ``weights`` has dense tensors ``(batch, heads, n, n)`` for
    ``n`` tokens: one tensor for the whole neighbourhood, or one tensor per chunk of the neighbourhood. ``chunk`` is the
    chunk length. ``ahead`` is from :func:`steps_ahead`.
    """
    batch, heads, length, _ = weights[0].shape
    starts = torch.arange(0, length, chunk, device=weights[0].device)
    within = torch.arange(chunk, device=weights[0].device)
    parts = []
    for number, step in enumerate(ahead):
        dense = weights[number if len(weights) > 1 else 0].unflatten(2, (-1, chunk))
        keys = (starts[:, None] + step * chunk + within) % length  # (chunks, chunk)
        parts.append(dense.gather(4, keys[:, None].expand(batch, heads, -1, chunk, -1)))
    return torch.cat(parts, dim=-1)


def with_own_token(weights: Tensor, share: Tensor, own: Tensor) -> Tensor:
    """Return ``weights / share`` or, for queries with ``share`` 0, the weight 1 for the query's own token.

    A query with ``share`` 0 sees no other token. If the neighbourhood contains several keys of the query's token, these
    keys share the weight 1 equally.

    Args:
        weights: ``(..., n)``, after dropout.
        share: ``(..., 1)``, the sum of the weights of each query before dropout.
        own: bool, broadcastable to ``weights``, True for keys of the query's own token (at least one per query).
    """
    alone = share == 0.0
    itself = own / own.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(alone, itself.to(weights.dtype), weights / share.masked_fill(alone, 1.0))


def of_rounds(
    probabilities: tuple[Tensor, ...], dropped: tuple[Tensor, ...], order: Tensor, chunk: int, ahead: list[int]
) -> Tensor:
    """Return the weights of all hash rounds in the model's layout.

    The result is ``(batch, heads, hashes * length / chunk, chunk, len(ahead) * chunk)``, as from :func:`in_chunks`.

    Args:
        probabilities: dense weights of the segments of the first round, then of the second round, and so on. Each is
            ``(batch, heads, length, hashes * length)``, with queries in token order and keys in sorted order.
        dropped: ``probabilities`` after dropout.
        order: ``(batch, heads, hashes, length)``, for each round the token index at each rank.
        chunk, ahead: as for :func:`in_chunks`.
    """
    hashes = order.shape[2]
    per_round = len(dropped) // hashes
    rounds = [slice(number * per_round, (number + 1) * per_round) for number in range(hashes)]
    tokens = order.flatten(2)

    def sort(weights: Tensor, number: int) -> Tensor:
        return weights.gather(2, order[:, :, number, :, None].expand(-1, -1, -1, weights.shape[3]))

    shares = [sum(part.sum(-1, keepdim=True) for part in probabilities[segments]) for segments in rounds]
    lists = [
        torch.cat([sort(dropped[segments][neighbour], number) for number, segments in enumerate(rounds)], dim=2)
        for neighbour in range(per_round)
    ]
    share = torch.cat([sort(torch.as_tensor(part), number) for number, part in enumerate(shares)], dim=2)
    own = in_chunks((tokens[..., None] == tokens[:, :, None],), chunk, ahead)
    return with_own_token(in_chunks(tuple(lists), chunk, ahead), share.unflatten(2, (-1, chunk)), own)
