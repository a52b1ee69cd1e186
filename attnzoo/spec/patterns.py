"""Patterns define which keys each query sees. A pattern is plain frozen data.

A function ``mask_mod(b, h, q, kv) -> bool``, as in FlexAttention, defines a pattern. Other methods help kernels to skip
work. For example, :meth:`Pattern.kv_spans` returns key ranges that contain all visible keys of a block of queries.
``offset`` is the position of the first query, counted in the key sequence (0 if there is no cache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Span = tuple[int, int]
UNLIMITED = 1 << 40  # larger than any distance between tokens, and much smaller than the int64 limit


class Band(NamedTuple):
    """The lowest and the highest visible distance (key index minus query index). ``UNLIMITED`` means no limit."""

    lowest: int
    highest: int


class Tile(NamedTuple):
    """A rectangle of the ``q_len x kv_len`` scores: queries ``q_start:q_stop`` and keys ``kv_start:kv_stop``."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    q_len: int
    kv_len: int

    @property
    def shape_and_distance(self) -> tuple[int, int, int]:
        """The number of queries, the number of keys, and the distance from the first query to the first key."""
        return (self.q_stop - self.q_start, self.kv_stop - self.kv_start, self.kv_start - self.q_start)


def _check_count(argument: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidArgumentError(argument, repr(value), f"an integer >= {minimum}")


def power_of_two(count: int) -> int:
    """Round the magnitude of a number up to a power of two and keep the sign. Return 0 for 0."""
    rounded = 1 << (abs(count) - 1).bit_length() if count else 0
    return rounded if count >= 0 else -rounded


@dataclass(frozen=True)
class Pattern:
    """Base class of patterns. ``q_len`` and ``kv_len`` are the lengths of the whole sequences in tokens."""

    @property
    def structure(self) -> Pattern:
        """A copy of the pattern without tensors, for use in requests."""
        return self

    @property
    def coarse(self) -> Pattern:
        """A copy of :attr:`structure` with offsets rounded up to powers of two, for the keys of stored measurements."""
        return self.structure

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        """Raise :class:`InvalidArgumentError` if the pattern is not defined for an attention of these sizes."""

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        """Return a function ``f(b, h, q, kv)`` of broadcastable indices: True where query ``q`` sees key ``kv``."""
        raise NotImplementedError

    def band(self, q_len: int, kv_len: int) -> Band | None:
        """Return the band of visible distances. Return None if the visible keys are not one range of distances."""
        return None

    def batch_and_heads(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the indices ``b`` and ``h`` for :meth:`mask_mod`.

        If :attr:`query_order` is None, both contain only index 0, because all samples and heads have equal masks.
        """
        order = self.query_order
        sizes = (1, 1) if order is None else order.shape[:2]
        batch, heads = (torch.arange(size, device=device) for size in sizes)
        return batch[:, None, None, None], heads[None, :, None, None]

    def kv_spans(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[Span, ...]:
        """Return disjoint key ranges ``(start, stop)`` that contain every key that queries ``q_start:q_stop`` see."""
        return ((0, kv_len),)

    def sees_all(self, tile: Tile) -> bool:
        """Return True only if every query of the tile sees every key of the tile. Such a tile needs no mask."""
        return False

    def block_size(self, q_len: int, kv_len: int) -> int:
        """Return the recommended number of queries per block, for kernels that process blocks of queries."""
        return q_len

    @property
    def query_order(self) -> Tensor | None:
        """The query indices ``(batch, heads, q_len)`` sorted by bucket (LSH). None means the order of the sequence."""
        return None

    def gathered(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> Iterator[Tensor] | None:
        """Return an iterator over tensors ``(batch, heads, m)`` with the indices of the keys that a block may see.

        No key index occurs twice in a head. -1 is padding. None means that all heads see the keys of :meth:`kv_spans`.
        """
        return None

    def sees_gathered(self, q_start: int, q_stop: int) -> bool:
        """Return True only if the queries ``q_start:q_stop`` see every key of :meth:`gathered`, in each head."""
        return False

    def block_key(self, tile: Tile) -> tuple[int, ...] | None:
        """Return a cache key, or None if no mask can be reused. Tiles with equal cache keys have equal masks."""
        return None


@dataclass(frozen=True)
class Full(Pattern):
    """A pattern in which every query sees every key.

    Attributes:
        cross: whether the keys come from another sequence (cross-attention). Distances between queries and keys then
            have no meaning, so approximate backends do not change the attention.
    """

    cross: bool = False

    def __repr__(self) -> str:
        return "Full(cross=True)" if self.cross else "Full()"

    @property
    def coarse(self) -> Pattern:
        return Full()

    def band(self, q_len: int, kv_len: int) -> Band:
        return Band(-UNLIMITED, UNLIMITED)

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        return lambda b, h, q, kv: (q >= 0) & (kv >= 0)

    def sees_all(self, tile: Tile) -> bool:
        return True


@dataclass(frozen=True)
class _Banded(Pattern):
    """Base class of patterns with a :class:`Band`. ``offset=None`` aligns the last query with the last key."""

    def __post_init__(self) -> None:
        offset: object = getattr(self, "offset", None)
        if offset is not None and (isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt))):
            raise InvalidArgumentError(f"offset of {type(self).__name__}", repr(offset), "an integer or None")

    def band(self, q_len: int, kv_len: int) -> Band:
        raise NotImplementedError

    def shift(self, q_len: int, kv_len: int) -> int:
        """Return the position of the first query, counted in the key sequence (0 if there is no cache)."""
        offset: int | None = getattr(self, "offset", None)
        return kv_len - q_len if offset is None else offset

    @property
    def coarse(self) -> Pattern:
        offset: int | None = getattr(self, "offset", None)
        return self if offset is None else replace(self, offset=power_of_two(offset))  # type: ignore[call-arg]

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        lowest, highest = self.band(q_len, kv_len)
        if lowest == -UNLIMITED:
            return lambda b, h, q, kv: kv <= q + highest
        return lambda b, h, q, kv: (kv >= q + lowest) & (kv <= q + highest)

    def kv_spans(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[Span, ...]:
        lowest, highest = self.band(q_len, kv_len)
        start, stop = max(0, q_start + lowest), min(kv_len, q_stop + highest)
        return ((start, stop),) if start < stop else ()

    def sees_all(self, tile: Tile) -> bool:
        lowest, highest = self.band(tile.q_len, tile.kv_len)
        return tile.kv_start - (tile.q_stop - 1) >= lowest and (tile.kv_stop - 1) - tile.q_start <= highest

    def block_key(self, tile: Tile) -> tuple[int, ...]:
        return tile.shape_and_distance


@dataclass(frozen=True)
class Causal(_Banded):
    """Causal attention, in which query ``i`` sees the keys up to position ``i + offset``.

    The default offset aligns the last query with the last key, as in FlashAttention. So new tokens see the whole cache.

    Raises:
        InvalidArgumentError: the offset is neither an integer nor None.

    Example:
        >>> Causal().kv_spans(0, 2, q_len=2, kv_len=5)  # two new tokens on a cache of three
        ((0, 5),)
    """

    offset: int | None = None

    def band(self, q_len: int, kv_len: int) -> Band:
        return Band(-UNLIMITED, self.shift(q_len, kv_len))


@dataclass(frozen=True)
class Window(_Banded):
    """Sliding window, in which a query at position ``p`` sees the keys from ``p - left`` to ``p + right`` inclusive.

    ``Window(w, 0)`` is the causal window of Mistral. ``Window(w, w)`` is the window of Longformer (Beltagy et al. 2020,
    arXiv:2004.05150) with ``attention_window = 2 * w``.

    Raises:
        InvalidArgumentError: ``left`` or ``right`` is negative; both are 0; ``offset`` is neither an integer nor None.

    Example:
        >>> Window(left=3, right=1).kv_spans(8, 10, q_len=20, kv_len=20)  # what queries 8 and 9 see
        ((5, 11),)
    """

    left: int
    right: int
    offset: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("window left", self.left, 0)
        _check_count("window right", self.right, 0)
        if self.left + self.right == 0:
            raise InvalidArgumentError("window", "left=0, right=0", "a window > 0 on at least one side")

    def band(self, q_len: int, kv_len: int) -> Band:
        shift = self.shift(q_len, kv_len)
        return Band(shift - self.left, shift + self.right)

    def block_size(self, q_len: int, kv_len: int) -> int:
        # A block of n queries reads n + left + right keys. Small blocks read few unneeded keys but need more calls.
        return min(q_len, max(64, min(256, (self.left + self.right) // 16)))


@dataclass(frozen=True)
class Chunks(Pattern):
    """Chunked attention of Reformer (Kitaev et al. 2020, arXiv:2001.04451).

    The sequence is cut into chunks of ``length`` tokens. A query in chunk ``c`` sees chunks ``c - before`` to
    ``c + after``. The chunk after the last chunk is the first chunk. With ``causal``, a query sees no later key.

    The last chunk may be shorter. A query sees no key twice, even if ``before + after + 1`` is more than the number of
    chunks. ``before`` or ``after`` may be negative: with ``Chunks(n, -1, 1)`` a query sees only the next chunk.

    Raises:
        InvalidArgumentError: ``length < 1``, or ``before + after < 0``. :meth:`check` raises if ``q_len != kv_len``.

    Example:
        >>> Chunks(4, before=1).kv_spans(8, 12, q_len=16, kv_len=16)  # the third chunk sees the second and itself
        ((4, 12),)
    """

    length: int
    before: int = 1
    after: int = 0
    causal: bool = False

    def __post_init__(self) -> None:
        _check_count("chunk length", self.length, 1)
        for name, count in (("chunks before", self.before), ("chunks after", self.after)):
            if isinstance(count, bool) or not isinstance(count, int):
                raise InvalidArgumentError(name, repr(count), "an integer")
        _check_count("chunks before + after", self.before + self.after, 0)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        if q_len != kv_len:
            got = f"{self} with {q_len} queries and {kv_len} keys"
            raise InvalidArgumentError("pattern", got, "as many queries as keys")

    def near(self, query_position: Tensor, kv: Tensor, kv_len: int) -> Tensor:
        """Return True where ``kv`` is in a chunk that a query at ``query_position`` sees. ``causal`` is ignored."""
        ahead = kv // self.length - query_position // self.length
        return (ahead + self.before) % -(-kv_len // self.length) <= self.before + self.after

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            near = self.near(q, kv, kv_len)
            return near & (kv <= q) if self.causal else near

        return mask

    def kv_spans(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[Span, ...]:
        return self.spans_near(q_start, q_stop, kv_len, q_stop if self.causal else kv_len)

    def spans_near(self, start: int, stop: int, kv_len: int, limit: int) -> tuple[Span, ...]:
        """Return the key ranges of the chunks that the query positions ``start:stop`` see, cut at key ``limit``."""
        count = -(-kv_len // self.length)
        first, last = start // self.length - self.before, (stop - 1) // self.length + self.after
        chunks = range(count) if last - first + 1 >= count else sorted({c % count for c in range(first, last + 1)})
        spans: list[Span] = []
        for chunk in chunks:
            begin, end = chunk * self.length, min(limit, (chunk + 1) * self.length)
            if spans and spans[-1][1] == begin < end:
                spans[-1] = (spans[-1][0], end)
            elif begin < end:
                spans.append((begin, end))
        return tuple(spans)

    def sees_all(self, tile: Tile) -> bool:
        return (not self.causal or tile.kv_stop <= tile.q_start + 1) and self._all_near(tile)

    def _all_near(self, tile: Tile) -> bool:
        """Whether all keys of the tile are in chunks that every query of the tile sees. ``causal`` is ignored."""
        if self.before + self.after + 1 >= -(-tile.kv_len // self.length):
            return True
        one_chunk = tile.q_start // self.length == (tile.q_stop - 1) // self.length
        spans = self.spans_near(tile.q_start, tile.q_stop, tile.kv_len, tile.kv_len)
        return one_chunk and any(start <= tile.kv_start and tile.kv_stop <= stop for start, stop in spans)

    def block_key(self, tile: Tile) -> tuple[int, ...] | None:
        return tile.shape_and_distance if self._all_near(tile) else None  # if all are near, only ``causal`` hides keys

    def block_size(self, q_len: int, kv_len: int) -> int:
        return min(q_len, self.length)


@dataclass(frozen=True)
class SortedChunks(Chunks):
    """Chunks of keys that LSH attention has sorted by bucket. Each query has a position among the sorted keys.

    The keys are in sorted order, and ``token`` contains the token index of each key. The queries are in sequence order.
    Query ``order[b, h, j]`` has position ``start + j`` among the sorted keys. Each hash round is one segment. The
    segments of all rounds have the same keys: the sorted keys of the first round, then those of the second round, and
    so on. So the first queries of a round can see the last chunk of the previous round, as in Reformer. The segments
    differ only in ``start`` and ``order``. A query never sees the key of the same token. In Reformer, query and key of
    a token have the same direction, so this key would have the largest score.

    Attributes:
        start: the position of query ``order[b, h, 0]`` among the sorted keys.
        order: ``(batch, heads, q_len)`` int64, the query indices of each head in sorted order.
        token: ``(batch, heads, kv_len)`` int64, the token index of each key. -1 hides the key (padding).
        causal: whether a query sees only keys of earlier tokens.
    """

    start: int = 0
    order: Tensor | None = field(default=None, compare=False, repr=False)
    token: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def structure(self) -> SortedChunks:
        return replace(self, order=None, token=None)

    @property
    def coarse(self) -> SortedChunks:
        return replace(self.structure, start=power_of_two(self.start))

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        for name, tensor, length in (("order", self.order, q_len), ("token", self.token, kv_len)):
            shape = (batch, heads, length)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != torch.long:
                got = None if tensor is None else f"shape {tuple(tensor.shape)}, {tensor.dtype}"
                raise InvalidArgumentError(f"{name} of the pattern", got, f"shape {shape}, torch.int64")

    @property
    def query_order(self) -> Tensor | None:
        return self.order

    def sorted_tensors(self) -> tuple[Tensor, Tensor]:
        """Return ``order`` and ``token``, or raise :class:`InvalidArgumentError`."""
        if self.order is None or self.token is None:
            raise InvalidArgumentError("pattern", f"{self} without order or token", "a pattern with order and token")
        return self.order, self.token

    def visible(self, query: Tensor, token: Tensor) -> Tensor:
        """Return True where the query of token ``query`` may see the key of token ``token``. The chunks are ignored."""
        return (token >= 0) & ((token < query) if self.causal else (token != query))

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        order, token = self.sorted_tensors()
        places = torch.argsort(order, dim=-1)

        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return self.near(places[b, h, q] + self.start, kv, kv_len) & self.visible(q, token[b, h, kv])

        return mask

    def kv_spans(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[Span, ...]:
        """Return the ranges of sorted keys in the chunks that the queries ``order[:, :, q_start:q_stop]`` see."""
        return self.spans_near(q_start + self.start, q_stop + self.start, kv_len, kv_len)

    def sees_all(self, tile: Tile) -> bool:
        return False

    def block_key(self, tile: Tile) -> tuple[int, ...] | None:
        return None
