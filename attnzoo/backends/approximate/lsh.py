"""The backend ``lsh``, which replaces dense attention by attention to keys with similar hashes.

Example: ``attnzoo.patch(model, backend="lsh", num_hashes=4, chunk_length=64, num_buckets=32)``.

Random rotations hash queries and keys to the nearest of ``num_buckets`` directions (cross-polytope LSH, Andoni et al.
2015, arXiv:1509.02897), so vectors with a large dot product are often in one bucket. As in Reformer (Kitaev et al.
2020, arXiv:2001.04451), the keys are sorted by bucket and position and cut into chunks of ``chunk_length``. Each query
has a rank among the sorted keys, and sees the chunk with this rank and the previous chunk. A non-causal query also sees
the next chunk. Hashing and sorting are repeated in ``num_hashes`` rounds, and a query sees the keys of all rounds.
There are four differences from Reformer:

- Queries and keys differ. The rank of a query is the index at which the bucket and position of the query would be
  inserted into the sorted keys. The rank depends only on the keys and this query. So the last token has the same output
  in a decoding step as in a forward over the whole sequence. An earlier token may have another output in this forward
  than in its own decoding step, because later keys change the chunks.
- A token always sees itself, the previous token and, if not causal, the next token. So every query sees a key, even if
  no key has a similar hash.
- A query sees a key only in the first round that shows the key, as in the paper. So the attention does not change at
  all if there is one bucket and one chunk. In Reformer's code, the key is in the softmax once per round.
- Each document of a packed row is sorted and cut separately, so other documents do not change the result.

The rotations come from a separate random generator with ``seed``. Hashing has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.approximate.base import ApproximateBackend, check_count
from attnzoo.backends.approximate.visible_keys import DocumentNumbers, QueryPlacement, number_documents, place_queries
from attnzoo.errors import InvalidArgumentError, Refusal
from attnzoo.registry import registry
from attnzoo.spec.hashed import HashedChunks, HashRound
from attnzoo.spec.patterns import Causal, Window
from attnzoo.spec.segments import Attention, Request, Segment

# This many tokens are hashed at a time, to limit the memory of the products with all directions.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class LshBackend(ApproximateBackend):
    """A backend that replaces dense attention by LSH attention. Dense attention requires the first three options.

    Attributes:
        num_hashes: the number of hash rounds.
        chunk_length: the number of keys per chunk.
        num_buckets: the number of buckets, which must be even or 1. With 1, all tokens are in one bucket.
        seed: the random seed of the rotations.

    Example:
        >>> import torch, attnzoo
        >>> q, k, v = torch.randn(3, 1, 2, 16, 8)
        >>> backend = attnzoo.configure("lsh", num_hashes=2, chunk_length=4, num_buckets=4)
        >>> attnzoo.attention(q, k, v, attnzoo.Causal(), backend=backend).shape
        torch.Size([1, 2, 16, 8])
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
            raise InvalidArgumentError(f"num_buckets of backend {self.name!r}", self.num_buckets, "1 or an even number")
        check_count(self.name, "seed", self.seed, 0)
        if self.seed >= 1 << 63:
            raise InvalidArgumentError(f"seed of backend {self.name!r}", self.seed, "an integer from 0 to 2**63 - 1")

    def describe(self, request: Request) -> str:
        return f"{self.num_hashes} hash rounds of {self.num_buckets} buckets, chunks of {self.chunk_length} keys"

    def more_refusals(self, request: Request) -> tuple[Refusal, ...]:
        """Refuse a bias if ``inner="auto"`` and only dense backends support this bias in the changed attention."""
        (segment,) = request.segments
        if self.inner != "auto" or segment.bias is None:
            return ()
        supporting = registry.supporting_backends(self.rewrite_request(request))
        if not supporting or not all(backend.dense for backend in supporting):
            return ()
        inner = " or ".join(f'inner="{backend.name}"' for backend in supporting)
        got = f"a {segment.bias} bias, which only dense backends support on hashed keys"
        return (Refusal("bias", got, f"no bias, or {inner} (which stores a score for each query and key)"),)

    def rewrite_request(self, request: Request) -> Request:
        (segment,) = request.segments
        offset = segment.pattern.offset if isinstance(segment.pattern, Causal) else None
        patterns = self._patterns(isinstance(segment.pattern, Causal), offset)
        return replace(request, segments=tuple(replace(segment, pattern=pattern) for pattern in patterns))

    def _patterns(
        self, causal: bool, offset: int | None, rounds: tuple[HashRound, ...] = ()
    ) -> tuple[Window | HashedChunks, ...]:
        """Return the window of neighbouring tokens and a pattern per hash round. For requests, ``rounds`` is empty."""
        hashed = HashedChunks(self.chunk_length or 0, 1, 0 if causal else 1, causal, min_distance=2, offset=offset)
        by_round = (replace(hashed, rounds=rounds[: number + 1]) for number in range(self.num_hashes or 0))
        return Window(1, 0 if causal else 1, offset), *by_round

    def rewrite_dense(self, attention: Attention, decisions: Any) -> tuple[Segment, ...]:
        (segment,) = attention.segments
        placement = place_queries(self.name, attention)
        rounds = self._rounds(attention, placement) if decisions is None else decisions
        patterns = self._patterns(placement.causal, placement.offset, rounds)
        return tuple(replace(segment, pattern=pattern) for pattern in patterns)

    def decisions(self, attention: Attention) -> Any:
        """Return one :class:`HashRound` per round, or None if this backend does not change the attention."""
        if self.changes(attention.request()) is None:
            return None
        return self._rounds(attention, place_queries(self.name, attention))

    @torch.no_grad()
    def _rounds(self, attention: Attention, placement: QueryPlacement) -> tuple[HashRound, ...]:
        (segment,) = attention.segments
        chunking = _Chunking.of(attention, placement, self.chunk_length or 0)
        rotations = _rotations(self.seed, self.num_hashes or 0, attention.head_dim, self.num_buckets or 0)
        device = segment.key.device
        return tuple(self._round(attention, placement, chunking, rotation.to(device)) for rotation in rotations)

    def _round(
        self, attention: Attention, placement: QueryPlacement, chunking: _Chunking, rotation: Tensor
    ) -> HashRound:
        (segment,) = attention.segments
        kv_len, kv_heads, buckets = segment.kv_len, segment.key.shape[1], self.num_buckets or 0
        positions = torch.arange(kv_len, device=rotation.device)
        # One sort by (document, bucket, position). Hidden keys come last, so no chunk of a document has hidden keys.
        key_base, query_base = (numbers[:, None] * buckets for numbers in chunking.documents)
        codes = (key_base + _buckets(segment.key, rotation)) * kv_len + positions
        hidden = kv_len * buckets * kv_len + positions
        codes, keys = torch.where(chunking.visible[:, None], codes, hidden).sort(dim=-1)
        query = torch.arange(placement.position, placement.position + attention.q_len, device=rotation.device)
        query_codes = (query_base + _buckets(attention.query, rotation)) * kv_len + query.clamp(0, kv_len - 1)
        # Neighbouring query heads share a key head, so the queries of these heads become one dimension.
        ranks = torch.searchsorted(codes, query_codes.reshape(attention.batch, kv_heads, -1)).view_as(query_codes)
        ranks = torch.minimum(ranks, chunking.last[:, None])
        return HashRound(keys, keys.argsort(dim=-1), chunking.chunks, ranks.argsort(dim=-1, stable=True), ranks)


class _Chunking(NamedTuple):
    """Which ranks of the sorted keys are in which chunk. The ranks are the same for all heads and rounds.

    Each document is sorted and cut separately, so other documents do not change the keys that a query sees. For
    example, documents of 3 and 2 keys and chunks of 2 keys give ranks 0 and 1 | 2 | 3 and 4.
    """

    visible: Tensor  # (batch or 1, kv_len) bool, the keys that at least one query may see
    documents: DocumentNumbers
    chunks: Tensor  # (batch, kv_len) int64, the chunk index of each rank
    last: Tensor  # (batch or 1, q_len) int64, the last rank in the document of each query

    @classmethod
    def of(cls, attention: Attention, placement: QueryPlacement, length: int) -> _Chunking:
        (segment,) = attention.segments
        kv_len, ranks = segment.kv_len, torch.arange(segment.kv_len, device=segment.key.device)
        # A static cache has unused entries after the last query, which a causal mask does not always hide.
        stop = placement.position + attention.q_len if placement.causal else kv_len
        visible = (ranks < stop)[None] if placement.visible is None else placement.visible & (ranks < stop)
        numbers = number_documents(attention, placement.spans)
        sizes = torch.zeros(visible.shape, dtype=torch.long, device=visible.device)
        sizes = sizes.scatter_add(1, numbers.keys.expand(visible.shape), visible.long())
        ends, counts = sizes.cumsum(1), -(-sizes // length)
        # Hidden keys have the ranks after all documents. The chunks of hidden keys continue after the last document.
        document = torch.searchsorted(ends, ranks.expand(visible.shape).contiguous(), right=True).clamp(max=kv_len - 1)
        first_rank, first_chunk = (ends - sizes).gather(1, document), (counts.cumsum(1) - counts).gather(1, document)
        chunks = first_chunk + (ranks - first_rank) // length
        last = (ends.gather(1, numbers.queries.expand(len(visible), -1)) - 1).clamp(min=0)
        return cls(visible, numbers, chunks.expand(attention.batch, -1).contiguous(), last)


@lru_cache(maxsize=64)
def _rotations(seed: int, rounds: int, dim: int, buckets: int) -> tuple[Tensor, ...]:
    """Return a tensor ``(dim, buckets / 2)`` per round. A column and its negative are the directions of two buckets."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rounds, dim, buckets // 2)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").unbind()


def _buckets(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Return the bucket ``(batch, heads, n)`` of each vector: the direction with which its dot product is largest.

    Vectors need no normalisation, because the bucket does not depend on the length of a vector.
    """
    if rotation.shape[1] == 0:
        return torch.zeros(vectors.shape[:3], dtype=torch.long, device=vectors.device)
    buckets = []
    for rows in vectors.split(_ROWS_AT_ONCE, dim=2):
        products = rows.to(rotation.dtype) @ rotation
        high, low = products.max(dim=-1), products.min(dim=-1)
        buckets.append(torch.where(high.values >= -low.values, high.indices, low.indices + rotation.shape[1]))
    return torch.cat(buckets, dim=2)
