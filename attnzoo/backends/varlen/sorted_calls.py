"""Express the sorted chunks of LSH attention exactly as calls of a causal kernel without masks.

Each chunk of queries becomes one sequence. This sequence contains the queries of the chunk and all keys that the chunk
sees, sorted by token. The query of a token precedes the key of this token. For example, the queries of tokens 3 and 5
and the keys of tokens 1, 3 and 5 become the sequence k1 q3 k3 q5 k5. A causal call lets each query see the keys before
it, i.e. the keys of earlier tokens. If the pattern is not causal, a second causal call on the reversed sequence adds
the keys of later tokens. No query sees the key of the same token, as ``SortedChunks`` requires.

A kernel needs a query and a key at each position of a sequence, but each position here has only one of the two. The
*spare row* replaces the other: a dummy query or a dummy key, the last row of the packed tensor. The dummy key is hidden
(:mod:`attnzoo.backends.varlen.packed`), and the output of the dummy query is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import SortedChunks
from attnzoo.spec.segments import Attention, Segment

_LAST = torch.iinfo(torch.long).max


def fold_heads(attention: Attention) -> Attention:
    """Return a copy in which each head is a sample with one head, because each head sorts its tokens differently.

    In the copy, ``empty`` is None.
    """
    batch, heads = attention.batch, attention.heads

    def fold(tensor: Tensor) -> Tensor:
        return expand_heads(tensor, heads).flatten(0, 1).unsqueeze(1)

    def repeat(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.repeat_interleave(heads, dim=0)

    folded: dict[int, Tensor] = {}  # hash rounds must share keys after folding too
    segments = []
    for segment in attention.segments:
        for tensor in (segment.key, segment.value):
            if id(tensor) not in folded:
                folded[id(tensor)] = fold(tensor)
        pattern = segment.pattern
        if isinstance(pattern, SortedChunks):
            order, token = (tensor.reshape(batch * heads, 1, -1) for tensor in pattern.sorted_tensors())
            pattern = replace(pattern, order=order, token=token)
        key, value = folded[id(segment.key)], folded[id(segment.value)]
        segments.append(Segment(key, value, pattern, repeat(segment.key_mask)))
    query_mask = repeat(attention.query_mask)
    return replace(attention, query=fold(attention.query), segments=tuple(segments), query_mask=query_mask, empty=None)


def sorted_rows(
    attention: Attention, segment: Segment, pattern: SortedChunks
) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Yield ``(lengths of the sequences, q_rows, k_rows)`` for each call. The segment must have one head.

    ``q_rows`` and ``k_rows`` are the indices of the rows of all sequences in the packed queries and the packed keys.
    """
    order, token = (tensor.squeeze(1) for tensor in pattern.sorted_tensors())
    if segment.key_mask is not None:
        token = token.masked_fill(~segment.key_mask, -1)
    samples = torch.arange(attention.batch, device=order.device)[:, None, None]
    for q_places, k_places in _neighbourhoods(pattern, attention.q_len, segment.kv_len):
        q_index, k_index = torch.tensor(q_places, device=order.device), torch.tensor(k_places, device=order.device)
        queries, tokens = order[:, q_index], token[:, k_index]  # (samples, chunks, n) and (samples, chunks, m)
        n, m = queries.shape[2], tokens.shape[2]
        for sign in (1,) if pattern.causal else (1, -1):
            places = (2 * sign * tokens + 1).masked_fill(tokens < 0, _LAST)  # hidden keys follow all queries
            merged = torch.argsort(torch.cat([2 * sign * queries, places], dim=-1), dim=-1)
            is_query = merged < n
            q_rows = queries.gather(2, merged.clamp(max=n - 1)) + samples * attention.q_len
            k_rows = k_index.expand_as(tokens).gather(2, (merged - n).clamp(min=0)) + samples * segment.kv_len
            lens = (n + m,) * (attention.batch * len(q_places))
            yield (
                lens,
                q_rows.masked_fill(~is_query, attention.batch * attention.q_len).flatten(),
                k_rows.masked_fill(is_query, attention.batch * segment.kv_len).flatten(),
            )


def _neighbourhoods(
    pattern: SortedChunks, q_len: int, kv_len: int
) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Yield the ranks of the queries and of the visible keys, for groups of chunks.

    A group contains all chunks with equal numbers of queries and of keys. For example, 6 queries and 6 keys in chunks
    of 2 with ``before=1`` make one group. The query ranks are [0, 1], [2, 3] and [4, 5], and the key ranks are
    [0, 1, 4, 5], [0, 1, 2, 3] and [2, 3, 4, 5]. A query rank is an index into ``order``. A key rank is an index into
    the sorted keys of all hash rounds.
    """
    groups: dict[tuple[int, int], tuple[list[list[int]], list[list[int]]]] = {}
    start = 0
    while start < q_len:
        stop = min(q_len, start + pattern.length - (pattern.start + start) % pattern.length)
        keys = [place for span in pattern.kv_spans(start, stop, q_len, kv_len) for place in range(*span)]
        if keys:
            group = groups.setdefault((stop - start, len(keys)), ([], []))
            group[0].append(list(range(start, stop)))
            group[1].append(keys)
        start = stop
    yield from groups.values()
