"""Masks of hashed chunks as additive terms, made from positions and chunk numbers: every block has its own.

As in ``tokens``: comparisons of floating-point numbers that write floating-point numbers are the
quick ones. Whatever hides a key adds to its count, and what counts more than 0 is hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.spec.hashed import HashedChunks, HashRound

# Far below any score, and finite: the products of it with 0 and 1 are what is wanted.
_HIDDEN = -1e30
_EXACT_IN_FLOAT32 = 1 << 24


class HashTerms:
    """Additive masks of one :class:`~attnzoo.spec.hashed.HashedChunks`; each is valid until the next one is made.

    Args:
        pattern: with its rounds.
        q_len, kv_len: of the attention.
        dtype: of the terms.
    """

    def __init__(self, pattern: HashedChunks, q_len: int, kv_len: int, dtype: torch.dtype) -> None:
        self._pattern, self._dtype = pattern, dtype
        self._shift = kv_len - q_len if pattern.offset is None else pattern.offset
        self._wide = torch.float32 if abs(self._shift) + q_len + kv_len < _EXACT_IN_FLOAT32 else torch.float64
        # A query sees chunks at a distance of at most _reach from where _centre puts it.
        self._centre, self._reach = (pattern.after - pattern.before) / 2, (pattern.after + pattern.before) / 2
        self._chunks = [self._numbers(one) for one in pattern.rounds]
        self._buffers: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def _numbers(self, one: HashRound) -> tuple[Tensor, Tensor]:
        """The chunks of all queries ``(batch, heads, q_len)`` and of all keys ``(batch, kv_heads, kv_len)``."""
        return one.query_chunks().to(self._wide) + self._centre, one.key_chunks().to(self._wide)

    def of(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """The term ``(batch, heads, n, m)``, and which rows see a key ``(batch, heads, n)``; None: all do.

        Args:
            queries: ``(batch, heads, n)`` long.
            keys: ``(batch, heads, m)`` long, -1 for none.
        """
        shape = (*queries.shape, keys.shape[2])
        if shape not in self._buffers:
            self._buffers[shape] = (
                queries.new_empty(shape, dtype=self._wide),
                queries.new_empty(shape, dtype=self._wide),
            )
        hidden, scratch = self._buffers[shape]
        position, apart = (queries + self._shift).to(self._wide), self._pattern.min_distance
        if self._pattern.causal:
            torch.gt(keys.to(self._wide)[:, :, None], (position - apart)[..., None], out=hidden)
        else:
            torch.sub(keys.to(self._wide)[:, :, None], position[..., None], out=hidden).abs_()
            torch.lt(hidden, apart, out=hidden)
        *earlier, own = self._chunks
        self._distance(own, queries, keys, scratch)
        hidden.add_(torch.gt(scratch, self._reach, out=scratch))
        for one in earlier:
            self._distance(one, queries, keys, scratch)
            hidden.add_(torch.le(scratch, self._reach, out=scratch))
        live = hidden.amin(-1) == 0.0
        return hidden.mul_(_HIDDEN).to(self._dtype), None if bool(live.all()) else live

    def _distance(self, chunks: tuple[Tensor, Tensor], queries: Tensor, keys: Tensor, out: Tensor) -> None:
        """How many chunks are between keys and the middle of what queries see; no key is infinitely far away."""
        of_queries, of_keys = chunks
        shared = keys.clamp(min=0).reshape(*of_keys.shape[:2], -1)  # a key head serves neighbouring query heads
        at = of_keys.gather(2, shared).view(keys.shape).masked_fill_(keys < 0, float("inf"))
        torch.sub(at[:, :, None], of_queries.gather(2, queries)[..., None], out=out).abs_()
