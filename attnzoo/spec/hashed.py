"""The pattern of attention by hash where queries and keys differ: near is what stands near in an order by bucket.

As in Reformer (Kitaev et al. 2020, arXiv:2001.04451) keys are sorted by bucket and cut into chunks, several times over.
There a query is its own key; here each query has a place among the sorted keys, which need not be a key's.
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
    """One sorting of the keys, and the queries' places in it.

    Attributes:
        keys: ``(batch, kv_heads, kv_len)`` long, the keys in sorted order.
        ranks: the same shape, where each key stands: the inverse of ``keys``.
        chunks: ``(batch, kv_len)`` long, the chunk of each rank, ascending from 0 without gaps.
        queries: ``(batch, heads, q_len)`` long, the queries in the order of their places.
        places: the same shape, at which rank each query stands.
    """

    keys: Tensor
    ranks: Tensor
    chunks: Tensor
    queries: Tensor
    places: Tensor

    def key_chunks(self) -> Tensor:
        """The chunk each key is in: ``(batch, kv_heads, kv_len)``."""
        return self._at(self.ranks)

    def query_chunks(self) -> Tensor:
        """The chunk each query stands in: ``(batch, heads, q_len)``."""
        return self._at(self.places)

    def _at(self, ranks: Tensor) -> Tensor:
        return self.chunks[:, None].expand(-1, ranks.shape[1], -1).gather(2, ranks)


@dataclass(frozen=True)
class HashedChunks(Pattern):
    """One round of hashing: the sorted keys are cut into chunks, and a query sees the chunks around its place.

    A query at a place in chunk ``c`` sees the keys of chunks ``c - before`` to ``c + after``; the first and the last
    have no neighbours beyond them. What an earlier round shows is not shown again, so that rounds united see every key
    once, as Reformer's paper has it; its code counts keys as often as they are met.

    Attributes:
        length: keys per chunk, at most: the rounds say which ranks are one chunk.
        before, after: neighbouring chunks.
        causal: a query sees keys up to its own position only.
        apart: keys closer than this to the query's position are left out: another segment shows them.
        offset: key position of query 0; None aligns the last query with the last key.
        rounds: this round, the last of them, and those before it.
    """

    length: int
    before: int = 1
    after: int = 1
    causal: bool = False
    apart: int = 0
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
            raise InvalidArgumentError("pattern rounds", "none", "at least one HashRound")
        for one in self.rounds:
            kv_heads = one.keys.shape[1] if one.keys.ndim == 3 else 0
            if not kv_heads or heads % kv_heads:
                raise InvalidArgumentError("pattern keys", tuple(one.keys.shape), f"({batch}, kv_heads, {kv_len})")
            shapes = {"keys": (kv_heads, kv_len), "ranks": (kv_heads, kv_len), "chunks": (kv_len,)}
            for name, shape in {**shapes, "queries": (heads, q_len), "places": (heads, q_len)}.items():
                tensor = getattr(one, name)
                if tuple(tensor.shape) != (batch, *shape) or tensor.dtype != torch.long:
                    got = f"{tuple(tensor.shape)} {tensor.dtype}"
                    raise InvalidArgumentError(f"pattern {name}", got, f"torch.int64 {(batch, *shape)}")

    @property
    def query_order(self) -> Tensor | None:
        return self.rounds[-1].queries if self.rounds else None

    def batch_and_heads(self, device: torch.device) -> tuple[Tensor, Tensor]:
        batch, heads = self.rounds[-1].places.shape[:2]
        return (
            torch.arange(batch, device=device)[:, None, None, None],
            torch.arange(heads, device=device)[None, :, None, None],
        )

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        shift = kv_len - q_len if self.offset is None else self.offset

        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            distance = q + shift - kv
            seen = distance >= self.apart if self.causal else distance.abs() >= self.apart
            *earlier, own = (self._near(one, b, h, q, kv) for one in self.rounds)
            seen = seen & own
            for near in earlier:
                seen = seen & ~near
            return seen

        return mask

    def _near(self, one: HashRound, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """True where a key's chunk is in the neighbourhood of that of a query's place."""
        group = one.places.shape[1] // one.ranks.shape[1]
        ahead = one.chunks[b, one.ranks[b, h // group, kv]] - one.chunks[b, one.places[b, h, q]]
        return (ahead >= -self.before) & (ahead <= self.after)

    def block_size(self, q_len: int, kv_len: int) -> int:
        # A block's queries stand in some chunks, whose neighbours it sees too: small blocks waste little.
        return min(q_len, max(128, self.length))

    def gathered(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> Iterator[Tensor]:
        """Which keys *sorted* queries ``q_start:q_stop`` may see: some ``(batch, heads, m)`` at a time, -1 for none.

        Each head has its own, a run of neighbours in sorted order, as many as the head with the longest run.
        """
        one = self.rounds[-1]
        ends = one.places.gather(2, one.queries[:, :, [q_start, q_stop - 1]])
        chunks = one.chunks.gather(1, ends.flatten(1)).view_as(ends)
        starts = torch.searchsorted(one.chunks, chunks[:, :, 0] - self.before)
        stops = torch.searchsorted(one.chunks, chunks[:, :, 1] + self.after, right=True)
        most = int((stops - starts).max()) if readable(starts) else kv_len
        for first in range(0, most, _KEYS_AT_ONCE):
            ranks = starts[:, :, None] + torch.arange(first, min(most, first + _KEYS_AT_ONCE), device=starts.device)
            # A key head serves neighbouring query heads.
            shared = ranks.clamp(max=kv_len - 1).view(*one.keys.shape[:2], -1)
            yield one.keys.gather(2, shared).view_as(ranks).masked_fill(ranks >= stops[:, :, None], -1)
