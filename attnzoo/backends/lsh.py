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

The rotations are drawn from ``seed`` by a generator of their own; hashing has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo import registry
from attnzoo.backends.rewriting import Rewriting, aligned_offset, check_count, first_position, real_keys
from attnzoo.errors import InvalidArgumentError, Refusal
from attnzoo.hashed import HashedChunks, HashRound
from attnzoo.patterns import Causal, Window
from attnzoo.segments import Attention, Request, Segment

# Hashed at once, so that products with all directions exist for this many tokens only.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class LshBackend(Rewriting):
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
        if self.kernel != "auto" or segment.bias is None:
            return ()
        takers = registry.candidates(self.rewrite_request(request))
        if not takers or not all(taker.dense for taker in takers):
            return ()
        allowed = " or ".join(f'kernel="{taker.name}"' for taker in takers)
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
        hashed = HashedChunks(self.chunk_length or 0, 1, 0 if causal else 1, causal, apart=2, offset=offset)
        made = (replace(hashed, rounds=rounds[: number + 1]) for number in range(self.num_hashes or 0))
        return Window(1, 0 if causal else 1, offset), *made

    def rewrite_dense(self, attention: Attention, choices: Any) -> tuple[Segment, ...]:
        (segment,) = attention.segments
        rounds = self.choices(attention) if choices is None else choices
        position = first_position(self.name, segment, attention.q_len)
        offset = aligned_offset(position, attention.q_len, segment.kv_len)
        patterns = self._patterns(_is_causal(attention), offset, rounds)
        return tuple(replace(segment, pattern=pattern) for pattern in patterns)

    @torch.no_grad()
    def choices(self, attention: Attention) -> Any:
        """One :class:`HashRound` per round of hashing; None where nothing is changed."""
        if self.changes(attention.request()) is None:
            return None
        (segment,) = attention.segments
        position = first_position(self.name, segment, attention.q_len)
        rotations = _rotations(self.seed, self.num_hashes or 0, attention.head_dim, self.num_buckets or 0)
        real = _shown(segment, position + attention.q_len if _is_causal(attention) else segment.kv_len)
        return tuple(self._round(attention, real, position, one.to(segment.key.device)) for one in rotations)

    def _round(self, attention: Attention, real: Tensor | None, position: int, rotation: Tensor) -> HashRound:
        (segment,) = attention.segments
        kv_len, kv_heads = segment.kv_len, segment.key.shape[1]
        places = torch.arange(kv_len, device=rotation.device)
        codes = _buckets(segment.key, rotation) * kv_len + places
        last = torch.full((1, 1, 1), kv_len - 1, device=rotation.device)
        if real is not None:  # hidden keys stand behind all others, so that they fill no chunk
            codes = torch.where(real[:, None], codes, (self.num_buckets or 0) * kv_len + places)
            last = (real.sum(1) - 1).clamp(min=0)[:, None, None]
        codes, keys = codes.sort(dim=-1)
        own = torch.arange(position, position + attention.q_len, device=rotation.device).clamp(0, kv_len - 1)
        asked = _buckets(attention.query, rotation) * kv_len + own
        # A key head serves neighbouring query heads.
        found = torch.searchsorted(codes, asked.reshape(attention.batch, kv_heads, -1)).view_as(asked)
        found = torch.minimum(found, last)
        return HashRound(keys, keys.argsort(dim=-1), found.argsort(dim=-1, stable=True), found)


def _is_causal(attention: Attention) -> bool:
    """A single query is a decoding step: nothing comes after it, and its neighbourhood is that of causal attention."""
    return isinstance(attention.segments[0].pattern, Causal) or attention.q_len == 1


def _shown(segment: Segment, stop: int) -> Tensor | None:
    """Keys before ``stop`` that some query may see: bool ``(batch or 1, kv_len)``; None: all of the segment's.

    A static cache has room behind the last query, which no mask need hide from causal attention.
    """
    real = real_keys(segment)
    if stop >= segment.kv_len:
        return real
    before = torch.arange(segment.kv_len, device=segment.key.device)[None] < stop
    return before if real is None else real & before


@lru_cache(maxsize=64)
def _rotations(seed: int, rounds: int, dim: int, buckets: int) -> tuple[Tensor, ...]:
    """Per round ``(dim, buckets / 2)``: a direction and its opposite are two buckets."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn((rounds, dim, buckets // 2), generator=generator, device="cpu").unbind())


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
