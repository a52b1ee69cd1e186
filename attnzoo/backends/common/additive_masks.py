"""Additive masks for ``SortedChunks`` and ``HashedChunks``. Every block needs a new mask, so this code must be fast.

On the CPU, comparing numbers is ten times faster if the result is a floating-point tensor and not a bool tensor. A fill
by a bool mask is slow too. So the code counts, in a floating-point tensor, why a query does not see a key (the key is
padding, the key is the query's own token, ...). A count of 0 means visible. The mask is the count times a large
negative number. The tensor is float64 if float32 cannot represent all token and chunk indices exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.spec.hashed import HashedChunks

# Far below any score, but finite, because -inf times a count of 0 would be NaN.
_HIDDEN = -1e30
_EXACT_IN_FLOAT32 = 1 << 24


class TokenMasks:
    """Factory of additive masks for all ``SortedChunks`` that share ``token``. A new mask may overwrite earlier masks.

    Args:
        token: the token index of each sorted key, ``(batch, heads, kv_len)`` int64. Hidden keys have token -1.
        causal: whether a query sees only keys of earlier tokens. If False, a query sees all tokens except its own.
        dtype: the dtype of the masks.
    """

    def __init__(self, token: Tensor, causal: bool, dtype: torch.dtype) -> None:
        self._causal, self._dtype = causal, dtype
        wide = torch.float32 if int(token.max()) < _EXACT_IN_FLOAT32 else torch.float64
        hidden = token < 0
        self._any_hidden = bool(hidden.any())
        # A hidden key must be neither the lowest nor the highest token of a range.
        self._for_lowest = token.to(wide).masked_fill_(hidden, float("inf"))
        self._for_highest = token.to(wide).masked_fill_(hidden, float("-inf"))
        self._hidden = hidden.to(wide)
        self._buffers: dict[tuple[int, ...], Tensor] = {}

    def of(self, queries: Tensor, start: int, stop: int, step: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return the mask ``(batch, heads, n, stop - start)`` between ``n`` queries and the sorted keys ``start:stop``.

        ``queries`` ``(batch, heads, n)`` are query indices, i.e. tokens. The second result is bool
        ``(batch, heads, n)``, True for queries that see a key, or None if all queries see a key.

        With queries ``(batch, heads, depth, n)``, the results also have the dimension ``depth``. The keys then begin at
        ``start`` for the first ``n`` queries, at ``start + step`` for the next ``n`` queries, and so on.
        """

        def near(tensor: Tensor) -> Tensor:
            """Return the values of the keys, ``(batch, heads, m)`` or ``(batch, heads, depth, m)``."""
            if queries.ndim == 3:
                return tensor[:, :, start:stop]
            return tensor[:, :, start : stop + (queries.shape[2] - 1) * step].unfold(2, stop - start, step)

        tokens, query = near(self._for_lowest), queries.to(self._for_lowest.dtype)
        shape = (*queries.shape, stop - start)
        if shape not in self._buffers:
            self._buffers[shape] = tokens.new_empty(shape)
        count = self._buffers[shape]
        lowest = tokens.amin(-1, keepdim=True)
        if self._causal:
            torch.ge(tokens[..., None, :], query[..., None], out=count)
            visible_rows = lowest < query
        else:
            torch.eq(tokens[..., None, :], query[..., None], out=count)
            if self._any_hidden:
                count.add_(near(self._hidden)[..., None, :])
            highest = near(self._for_highest).amax(-1, keepdim=True)
            visible_rows = (lowest <= highest) & ((lowest != query) | (highest != query))
        return count.mul_(_HIDDEN).to(self._dtype), None if bool(visible_rows.all()) else visible_rows


class HashMasks:
    """Factory of additive masks for one ``HashedChunks`` pattern. A new mask may overwrite earlier masks."""

    def __init__(self, pattern: HashedChunks, q_len: int, kv_len: int, dtype: torch.dtype) -> None:
        self._pattern, self._dtype = pattern, dtype
        self._shift = kv_len - q_len if pattern.offset is None else pattern.offset
        self._wide = torch.float32 if abs(self._shift) + q_len + kv_len < _EXACT_IN_FLOAT32 else torch.float64
        # A query of chunk c sees the chunks at a distance of at most _reach from c + _centre.
        self._centre, self._reach = (pattern.after - pattern.before) / 2, (pattern.after + pattern.before) / 2
        # Per round: _centre plus the chunk index of each query, and the chunk index of each key.
        self._chunks = [
            (r.query_chunks().to(self._wide) + self._centre, r.key_chunks().to(self._wide)) for r in pattern.rounds
        ]
        self._buffers: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def of(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mask ``(batch, heads, n, m)``, and the same second result as :meth:`TokenMasks.of`.

        ``queries`` ``(batch, heads, n)`` are query indices. ``keys`` ``(batch, heads, m)`` are key indices, or -1 for
        no key.
        """
        shape = (*queries.shape, keys.shape[2])
        if shape not in self._buffers:
            empty = queries.new_empty
            self._buffers[shape] = empty(shape, dtype=self._wide), empty(shape, dtype=self._wide)
        count, scratch = self._buffers[shape]
        position, apart = (queries + self._shift).to(self._wide), self._pattern.min_distance
        if self._pattern.causal:
            torch.gt(keys.to(self._wide)[:, :, None], (position - apart)[..., None], out=count)
        else:
            torch.sub(keys.to(self._wide)[:, :, None], position[..., None], out=count).abs_()
            torch.lt(count, apart, out=count)
        *earlier, last = self._chunks
        self._distance(last, queries, keys, scratch)
        count.add_(torch.gt(scratch, self._reach, out=scratch))
        for chunks in earlier:
            self._distance(chunks, queries, keys, scratch)
            count.add_(torch.le(scratch, self._reach, out=scratch))
        visible_rows = count.amin(-1) == 0.0
        return count.mul_(_HIDDEN).to(self._dtype), None if bool(visible_rows.all()) else visible_rows

    def _distance(self, chunks: tuple[Tensor, Tensor], queries: Tensor, keys: Tensor, out: Tensor) -> None:
        """Write to ``out`` the distance, in chunks, of each key from the middle of the chunks that each query sees.

        For example, the middle of chunks 2 and 3 is 2.5, so a key in chunk 2 gets 0.5. Key -1 gets infinity.
        ``chunks`` has the middle for each query and the chunk index of each key.
        """
        query_chunks, key_chunks = chunks
        shared = keys.clamp(min=0).reshape(*key_chunks.shape[:2], -1)  # neighbouring query heads share a key head
        of_keys = key_chunks.gather(2, shared).view(keys.shape).masked_fill_(keys < 0, float("inf"))
        torch.sub(of_keys[:, :, None], query_chunks.gather(2, queries)[..., None], out=out).abs_()
