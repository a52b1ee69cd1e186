"""``lsh``: dense attention looks where its queries hash to.

``attnzoo.patch(model, backend="lsh", num_hashes=4, chunk_length=64, num_buckets=32)``. Queries and keys are hashed by
the same random rotations, to the bucket of the nearest of ``num_buckets`` directions (cross-polytope LSH, Andoni et al.
2015, arXiv:1509.02897), so that those with a large product tend to meet. As in Reformer (Kitaev et al. 2020,
arXiv:2001.04451) keys are sorted by bucket, then position, and cut into chunks of ``chunk_length``; a query sees the
chunk it would stand in and the one before (where attention is not causal, the one after too), and ``num_hashes`` such
rounds are united. What differs from Reformer:

- Queries are not keys: a query's place is where its own bucket and position would stand among the sorted keys. It
  depends on all keys and on itself alone, so a decoding step gives what the last row of a whole forward gives. (Earlier
  rows may not: chunks are cut anew as keys come.)
- A token always sees itself and its neighbours (the one before, if causal): a row that hashes away from all it may see
  still sees something.
- A key that several rounds show counts once, as in the paper; Reformer's code counts it as often as it is met. With one
  bucket and chunks as long as the sequence, this is full attention.
- A packed row holds documents that its mask hides from each other. Each is sorted and cut into chunks by itself, so
  that it gives what it gives alone.

The rotations are drawn from ``seed`` by a generator of their own; hashing has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.approximate.base import ApproximateBackend, check_count
from attnzoo.backends.approximate.visible_keys import Documents, Standing, aligned_offset, documents, standing
from attnzoo.errors import InvalidArgumentError, Refusal
from attnzoo.registry import registry
from attnzoo.spec.hashed import HashedChunks, HashRound
from attnzoo.spec.patterns import Causal, Window
from attnzoo.spec.segments import Attention, Request, Segment

# Hashed at once, so that products with all directions exist for this many tokens only.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class LshBackend(ApproximateBackend):
    """Attention by hash in place of dense attention, which needs the first three options.

    Attributes:
        num_hashes: rounds of hashing.
        chunk_length: keys per chunk.
        num_buckets: directions to hash to: an even number, or 1 for no hashing at all.
        seed: of the rotations.
    """

    name: ClassVar[str] = "lsh"
    needed: ClassVar[tuple[str, ...]] = ("num_hashes", "chunk_length", "num_buckets")
    example: ClassVar[Mapping[str, object]] = {"num_hashes": 2, "chunk_length": 8, "num_buckets": 4}

    num_hashes: int | None = None
    chunk_length: int | None = None
    num_buckets: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in self.needed:
            if getattr(self, option) is not None:
                check_count(self.name, option, getattr(self, option), 1)
        if self.num_buckets is not None and self.num_buckets > 1 and self.num_buckets % 2:
            raise InvalidArgumentError(
                f"num_buckets of backend {self.name!r}", self.num_buckets, "1, or an even number"
            )
        check_count(self.name, "seed", self.seed, 0)
        if self.seed >= 1 << 63:
            raise InvalidArgumentError(f"seed of backend {self.name!r}", self.seed, "an integer >= 0 of 63 bits")

    def describe(self, request: Request) -> str:
        return f"{self.num_hashes} hash rounds of {self.num_buckets} buckets, chunks of {self.chunk_length} keys"

    def more_refusals(self, request: Request) -> tuple[Refusal, ...]:
        """A bias where ``auto`` could only take a kernel with scores for every query and key: ask by name."""
        (segment,) = request.segments
        if self.inner != "auto" or segment.bias is None:
            return ()
        takers = registry.supporting_backends(self.rewrite_request(request))
        if not takers or not all(taker.dense for taker in takers):
            return ()
        allowed = " or ".join(f'inner="{taker.name}"' for taker in takers)
        got = f"a {segment.bias} bias, which only dense kernels take on hashed keys"
        return (Refusal("bias", got, f"no bias; or {allowed}, with scores for every query and key"),)

    def rewrite_request(self, request: Request) -> Request:
        (segment,) = request.segments
        offset = segment.pattern.offset if isinstance(segment.pattern, Causal) else None
        patterns = self._patterns(isinstance(segment.pattern, Causal), offset)
        return replace(request, segments=tuple(replace(segment, pattern=pattern) for pattern in patterns))

    def _patterns(
        self, causal: bool, offset: int | None, rounds: tuple[HashRound, ...] = ()
    ) -> tuple[Window | HashedChunks, ...]:
        """The window of neighbours, then the rounds."""
        hashed = HashedChunks(self.chunk_length or 0, 1, 0 if causal else 1, causal, min_distance=2, offset=offset)
        made = (replace(hashed, rounds=rounds[: number + 1]) for number in range(self.num_hashes or 0))
        return Window(1, 0 if causal else 1, offset), *made

    def rewrite_dense(self, attention: Attention, choices: Any) -> tuple[Segment, ...]:
        (segment,) = attention.segments
        place = standing(self.name, attention)
        rounds = self._rounds(attention, place) if choices is None else choices
        offset = aligned_offset(place.position, attention.q_len, segment.kv_len)
        patterns = self._patterns(place.causal, offset, rounds)
        return tuple(replace(segment, pattern=pattern) for pattern in patterns)

    def decisions(self, attention: Attention) -> Any:
        """One :class:`HashRound` per round of hashing; None where nothing is changed."""
        if self.changes(attention.request()) is None:
            return None
        return self._rounds(attention, standing(self.name, attention))

    @torch.no_grad()
    def _rounds(self, attention: Attention, place: Standing) -> tuple[HashRound, ...]:
        (segment,) = attention.segments
        layout = _Layout.of(attention, place, self.chunk_length or 0)
        rotations = _rotations(self.seed, self.num_hashes or 0, attention.head_dim, self.num_buckets or 0)
        return tuple(self._round(attention, place, layout, one.to(segment.key.device)) for one in rotations)

    def _round(self, attention: Attention, place: Standing, layout: _Layout, rotation: Tensor) -> HashRound:
        (segment,) = attention.segments
        kv_len, kv_heads, buckets = segment.kv_len, segment.key.shape[1], self.num_buckets or 0
        places = torch.arange(kv_len, device=rotation.device)
        of_keys, of_queries = (numbers[:, None] * buckets for numbers in layout.documents)
        codes = (of_keys + _buckets(segment.key, rotation)) * kv_len + places
        # Hidden keys stand behind all others, so that they fill no chunk.
        hidden = kv_len * buckets * kv_len + places
        codes, keys = torch.where(layout.real[:, None], codes, hidden).sort(dim=-1)
        own = torch.arange(place.position, place.position + attention.q_len, device=rotation.device)
        asked = (of_queries + _buckets(attention.query, rotation)) * kv_len + own.clamp(0, kv_len - 1)
        # A key head serves neighbouring query heads.
        found = torch.searchsorted(codes, asked.reshape(attention.batch, kv_heads, -1)).view_as(asked)
        found = torch.minimum(found, layout.last[:, None])
        return HashRound(keys, keys.argsort(dim=-1), layout.chunks, found.argsort(dim=-1, stable=True), found)


class _Layout(NamedTuple):
    """How the sorted keys of a sample are cut into chunks: the same in all heads and rounds.

    Each document is sorted and cut by itself, so that its queries see what they would see if it stood alone.

    Attributes:
        real: ``(batch or 1, kv_len)`` bool, the keys that some query may see.
        documents: of keys and queries, by number.
        chunks: ``(batch, kv_len)`` long, the chunk of each rank.
        last: ``(batch or 1, q_len)`` long, the last rank in the document of each query.
    """

    real: Tensor
    documents: Documents
    chunks: Tensor
    last: Tensor

    @classmethod
    def of(cls, attention: Attention, place: Standing, length: int) -> _Layout:
        (segment,) = attention.segments
        kv_len, ranks = segment.kv_len, torch.arange(segment.kv_len, device=segment.key.device)
        # A static cache has room behind the last query, which no mask need hide from causal attention.
        stop = place.position + attention.q_len if place.causal else kv_len
        real = (ranks < stop)[None] if place.real is None else place.real & (ranks < stop)
        numbers = documents(attention, place.spans)
        sizes = torch.zeros(real.shape, dtype=torch.long, device=real.device)
        sizes = sizes.scatter_add(1, numbers.keys.expand(real.shape), real.long())
        ends, counts = sizes.cumsum(1), -(-sizes // length)
        # What is hidden from all has the ranks behind all documents, and goes on counting from the last one.
        at = torch.searchsorted(ends, ranks.expand(real.shape).contiguous(), right=True).clamp(max=kv_len - 1)
        begin, chunk = ((whole - each).gather(1, at) for whole, each in ((ends, sizes), (counts.cumsum(1), counts)))
        chunks = chunk + (ranks - begin) // length
        last = (ends.gather(1, numbers.queries.expand(len(real), -1)) - 1).clamp(min=0)
        return cls(real, numbers, chunks.expand(attention.batch, -1).contiguous(), last)


@lru_cache(maxsize=64)
def _rotations(seed: int, rounds: int, dim: int, buckets: int) -> tuple[Tensor, ...]:
    """Per round ``(dim, buckets / 2)``: a direction and its opposite are two buckets."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rounds, dim, buckets // 2)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").unbind()


def _buckets(vectors: Tensor, rotation: Tensor) -> Tensor:
    """The bucket of each vector ``(batch, heads, n, dim)``: that of the direction it has the largest product with.

    Its length does not matter, so nothing is normalised.
    """
    if rotation.shape[1] == 0:
        return torch.zeros(vectors.shape[:3], dtype=torch.long, device=vectors.device)
    found = []
    for rows in vectors.split(_ROWS_AT_ONCE, dim=2):
        products = rows.to(rotation.dtype) @ rotation
        high, low = products.max(dim=-1), products.min(dim=-1)
        found.append(torch.where(high.values >= -low.values, high.indices, low.indices + rotation.shape[1]))
    return torch.cat(found, dim=2)
