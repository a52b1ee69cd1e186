"""The pattern of LSH attention for queries and keys that are different vectors. Queries see keys with similar hashes.

As in Reformer (Kitaev et al. 2020, arXiv:2001.04451), each round sorts the keys by bucket and cuts them into chunks. In
Reformer, queries and keys are equal. Here they differ, so each query also needs a rank among the sorted keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.patterns import MaskMod, Pattern, power_of_two
from attnzoo.spec.transforms import readable

_KEYS_AT_ONCE = 1024


@dataclass(frozen=True)
class HashRound:
    """The sorted order of the keys in a round. A rank is a position in this order. All tensors are int64.

    Attributes:
        keys: ``(batch, kv_heads, kv_len)``, the key indices in sorted order.
        key_ranks: ``(batch, kv_heads, kv_len)``, the rank of each key, i.e. the inverse of ``keys``.
        chunks: ``(batch, kv_len)``, the chunk index of each rank. These indices start at 0 and ascend without gaps.
        queries: ``(batch, heads, q_len)``, the query indices in the order of their ranks.
        query_ranks: ``(batch, heads, q_len)``, the rank of each query among the sorted keys.
    """

    keys: Tensor
    key_ranks: Tensor
    chunks: Tensor
    queries: Tensor
    query_ranks: Tensor

    def key_chunks(self) -> Tensor:
        """Return the chunk index of each key: ``(batch, kv_heads, kv_len)``."""
        return self._chunks_at(self.key_ranks)

    def query_chunks(self) -> Tensor:
        """Return the chunk index of each query: ``(batch, heads, q_len)``."""
        return self._chunks_at(self.query_ranks)

    def _chunks_at(self, ranks: Tensor) -> Tensor:
        return self.chunks[:, None].expand(-1, ranks.shape[1], -1).gather(2, ranks)


@dataclass(frozen=True)
class HashedChunks(Pattern):
    """One hash round. The sorted keys are cut into chunks, and a query sees the chunks near the rank of the query.

    A query with a rank in chunk ``c`` sees the keys of chunks ``c - before`` to ``c + after``. The first chunk is not a
    neighbour of the last chunk. As in the Reformer paper, a round hides keys that the query saw in an earlier round, so
    no key is in the softmax twice. Reformer's code differs: a key is in the softmax once per round that shows the key.

    Attributes:
        length: the largest number of keys in a chunk.
        before, after: how many chunks before and after the chunk of the query are visible.
        causal: whether a query sees only keys up to the position of the query.
        min_distance: a query sees no key at a smaller distance. Another segment contains these closer keys.
        offset: the position of query 0 in the key sequence. None aligns the last query with the last key.
        rounds: the earlier rounds and, as the last element, this round.
    """

    length: int
    before: int = 1
    after: int = 1
    causal: bool = False
    min_distance: int = 0
    offset: int | None = None
    rounds: tuple[HashRound, ...] = field(default=(), compare=False, repr=False)

    @property
    def structure(self) -> Pattern:
        return replace(self, rounds=())

    @property
    def coarse(self) -> Pattern:
        return replace(self, offset=None if self.offset is None else power_of_two(self.offset), rounds=())

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        if not self.rounds:
            raise InvalidArgumentError("rounds of the pattern", "()", "a tuple of at least one HashRound")
        for hash_round in self.rounds:
            keys = hash_round.keys
            kv_heads = keys.shape[1] if keys.ndim == 3 else 0
            if not kv_heads or heads % kv_heads:
                raise InvalidArgumentError(
                    "keys of the pattern",
                    f"shape {tuple(keys.shape)}",
                    f"shape ({batch}, a divisor of {heads}, {kv_len})",
                )
            shapes = {"keys": (kv_heads, kv_len), "key_ranks": (kv_heads, kv_len), "chunks": (kv_len,)}
            for name, shape in {**shapes, "queries": (heads, q_len), "query_ranks": (heads, q_len)}.items():
                tensor = getattr(hash_round, name)
                if tuple(tensor.shape) != (batch, *shape) or tensor.dtype != torch.long:
                    got = f"shape {tuple(tensor.shape)}, {tensor.dtype}"
                    raise InvalidArgumentError(f"{name} of the pattern", got, f"shape {(batch, *shape)}, torch.int64")

    @property
    def query_order(self) -> Tensor | None:
        return self.rounds[-1].queries if self.rounds else None

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        shift = kv_len - q_len if self.offset is None else self.offset

        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            distance = q + shift - kv
            seen = distance >= self.min_distance if self.causal else distance.abs() >= self.min_distance
            *earlier, current = (self._is_near(hash_round, b, h, q, kv) for hash_round in self.rounds)
            seen = seen & current
            for near in earlier:
                seen = seen & ~near
            return seen

        return mask

    def _is_near(self, hash_round: HashRound, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        group = hash_round.query_ranks.shape[1] // hash_round.key_ranks.shape[1]
        key_rank, query_rank = hash_round.key_ranks[b, h // group, kv], hash_round.query_ranks[b, h, q]
        ahead = hash_round.chunks[b, key_rank] - hash_round.chunks[b, query_rank]
        return (ahead >= -self.before) & (ahead <= self.after)

    def block_size(self, q_len: int, kv_len: int) -> int:
        # A block reads the chunks of its queries and the neighbouring chunks. Small blocks read few unneeded keys.
        return min(q_len, max(128, self.length))

    def gathered(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> Iterator[Tensor]:
        """Yield the indices ``(batch, heads, m)`` of the keys that the sorted queries ``q_start:q_stop`` may see.

        In each head these keys have consecutive ranks. A head with fewer keys than other heads is padded with -1.
        """
        hash_round = self.rounds[-1]
        ends = hash_round.query_ranks.gather(2, hash_round.queries[:, :, [q_start, q_stop - 1]])
        chunks = hash_round.chunks.gather(1, ends.flatten(1)).view_as(ends)
        starts = torch.searchsorted(hash_round.chunks, chunks[:, :, 0] - self.before)
        stops = torch.searchsorted(hash_round.chunks, chunks[:, :, 1] + self.after, right=True)
        most = int((stops - starts).max()) if readable(starts) else kv_len
        for first in range(0, most, _KEYS_AT_ONCE):
            ranks = starts[:, :, None] + torch.arange(first, min(most, first + _KEYS_AT_ONCE), device=starts.device)
            # Neighbouring query heads share a key head, so the ranks of these query heads become one dimension.
            shared = ranks.clamp(max=kv_len - 1).view(*hash_round.keys.shape[:2], -1)
            yield hash_round.keys.gather(2, shared).view_as(ranks).masked_fill(ranks >= stops[:, :, None], -1)
