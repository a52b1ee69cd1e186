"""Patterns: who sees whom, as plain frozen data.

A pattern states its truth once, as a FlexAttention ``mask_mod(b, h, q, kv) -> bool``, and beside it its *structure*:
which spans of keys a block of queries can see at all (so that a kernel may skip the rest), and whether a block is
visible without a mask. Indices are positions in the query and key sequences; ``offset`` is the key position of query 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Span = tuple[int, int]


def _check_count(argument: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidArgumentError(argument, repr(value), f"an integer >= {minimum}")


def power_of_two(count: int) -> int:
    """The next power of two in size, of the same sign; 0 stays 0."""
    rounded = 1 << (abs(count) - 1).bit_length() if count else 0
    return rounded if count >= 0 else -rounded


@dataclass(frozen=True)
class Pattern:
    """Base class. ``q_len`` and ``kv_len`` are the lengths of the whole query and key sequences, in tokens."""

    @property
    def structure(self) -> Pattern:
        """The pattern without tensors: what requests hold."""
        return self

    @property
    def coarse(self) -> Pattern:
        """The structure, with what grows with the lengths rounded up to a power of two: what is measured once."""
        return self.structure

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        """Raise :class:`InvalidArgumentError` if the pattern has no meaning for an attention of this size."""

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        """The truth: a function of broadcastable index tensors, True where query ``q`` sees key ``kv``."""
        raise NotImplementedError

    def batch_and_heads(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The batch and head indices a mask has to be evaluated at: one of each, unless they differ."""
        one = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device)
        return one, one

    def kv_spans(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[Span, ...]:
        """Disjoint ``(start, stop)`` key ranges outside which queries ``q_start:q_stop`` see nothing."""
        return ((0, kv_len),)

    def sees_all(self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int) -> bool:
        """True when every query of the block certainly sees every key of the block: no mask is needed."""
        return False

    def block_size(self, q_len: int, kv_len: int) -> int:
        """Number of queries a blocked kernel had best take at once."""
        return q_len

    @property
    def query_order(self) -> Tensor | None:
        """``(batch, heads, q_len)``: query indices in the order the structure speaks of, if it is not their own."""
        return None

    def gathered(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> Iterator[Tensor] | None:
        """Where the queries of a block see no common range of keys: which keys, for each head its own.

        Some ``(batch, heads, m)`` at a time, each key once, -1 for none; None: :meth:`kv_spans` tells.
        """
        return None

    def block_key(
        self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int
    ) -> tuple[int, ...] | None:
        """A key such that blocks of equal key have equal masks, so that a kernel may reuse one; None: no promise."""
        return None


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key.

    Attributes:
        cross: the keys are another sequence's (cross-attention), so that no key is near a query or far from it. Who
            sees whom is the same; backends that keep to what is near leave such attention as it is.
    """

    cross: bool = False

    def __repr__(self) -> str:
        return "Full(cross=True)" if self.cross else "Full()"

    @property
    def coarse(self) -> Pattern:
        return Full()

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        return lambda b, h, q, kv: (q >= 0) & (kv >= 0)

    def sees_all(self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int) -> bool:
        return True


@dataclass(frozen=True)
class _Aligned(Pattern):
    """Patterns by relative position. ``offset=None`` aligns the last query with the last key (bottom right)."""

    def __post_init__(self) -> None:
        offset: object = getattr(self, "offset", None)
        if offset is not None and (isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt))):
            raise InvalidArgumentError(f"offset of {type(self).__name__}", repr(offset), "an integer, or None")

    def shift(self, q_len: int, kv_len: int) -> int:
        """Key position of query 0."""
        offset: int | None = getattr(self, "offset", None)
        return kv_len - q_len if offset is None else offset

    @property
    def coarse(self) -> Pattern:
        offset: int | None = getattr(self, "offset", None)
        return self if offset is None else replace(self, offset=power_of_two(offset))  # type: ignore[call-arg]

    def block_key(
        self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int
    ) -> tuple[int, ...]:
        return (q_start + self.shift(q_len, kv_len) - kv_start, q_stop - q_start, kv_stop - kv_start)


@dataclass(frozen=True)
class Causal(_Aligned):
    """Query ``i`` sees keys up to its own position ``i + offset``.

    The default offset aligns bottom right, as FlashAttention does: new tokens on a longer cache see all of the cache.

    Raises:
        InvalidArgumentError: the offset is neither an integer nor None.
    """

    offset: int | None = None

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        shift = self.shift(q_len, kv_len)
        return lambda b, h, q, kv: kv <= q + shift

    def kv_spans(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[Span, ...]:
        stop = min(kv_len, q_stop + self.shift(q_len, kv_len))
        return ((0, stop),) if stop > 0 else ()

    def sees_all(self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int) -> bool:
        return kv_stop <= q_start + self.shift(q_len, kv_len) + 1


@dataclass(frozen=True)
class Window(_Aligned):
    """Sliding window: query at position ``p`` sees keys ``p - left .. p + right``, itself included.

    ``Window(w, 0)`` is the causal window of Mistral; ``Window(w, w)`` that of Longformer (Beltagy et al. 2020,
    arXiv:2004.05150) with ``attention_window = 2 * w``.

    Raises:
        InvalidArgumentError: a side is negative, or both are zero; the offset is neither an integer nor None.
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

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        shift, left, right = self.shift(q_len, kv_len), self.left, self.right
        return lambda b, h, q, kv: (kv >= q + (shift - left)) & (kv <= q + (shift + right))

    def kv_spans(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[Span, ...]:
        shift = self.shift(q_len, kv_len)
        start, stop = max(0, q_start + shift - self.left), min(kv_len, q_stop + shift + self.right)
        return ((start, stop),) if start < stop else ()

    def sees_all(self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int) -> bool:
        shift = self.shift(q_len, kv_len)
        return kv_start >= q_stop - 1 + shift - self.left and kv_stop - 1 <= q_start + shift + self.right

    def block_size(self, q_len: int, kv_len: int) -> int:
        # A block of n queries touches n + left + right keys: small blocks waste little, but each costs a kernel call.
        return min(q_len, max(64, min(256, (self.left + self.right) // 16)))


@dataclass(frozen=True)
class Chunks(Pattern):
    """Chunked attention of Reformer (Kitaev et al. 2020, arXiv:2001.04451).

    The sequence is cut into chunks of ``length`` tokens; a query in chunk ``c`` sees chunks ``c - before`` to
    ``c + after``. The neighbourhood wraps around the end of the sequence; with ``causal`` a query sees only keys up to
    its own position, so that nothing wrapped from the end is visible.

    The last chunk may be partial. Each key is seen at most once, however often the neighbourhood wraps onto it. One of
    ``before`` and ``after`` may be negative: ``Chunks(n, -1, 1)`` sees the next chunk alone.

    Raises:
        InvalidArgumentError: ``length < 1``, an empty neighbourhood, or (in use) query and key lengths that differ.
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
            raise InvalidArgumentError(
                "pattern", f"{self} with {q_len} queries and {kv_len} keys", "as many queries as keys"
            )

    def near(self, query_position: Tensor, kv: Tensor, kv_len: int) -> Tensor:
        """True where the key's chunk is in the neighbourhood of that of a query at a position."""
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
        """Key ranges below ``limit`` in the neighbourhood of queries at positions ``start:stop``."""
        count = -(-kv_len // self.length)
        first, last = start // self.length - self.before, (stop - 1) // self.length + self.after
        chunks = range(count) if last - first + 1 >= count else sorted({c % count for c in range(first, last + 1)})
        spans: list[Span] = []
        for chunk in chunks:
            begin, end = chunk * self.length, min(limit, (chunk + 1) * self.length)
            if begin >= end:
                continue
            if spans and spans[-1][1] == begin:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((begin, end))
        return tuple(spans)

    def sees_all(self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int) -> bool:
        if self.causal and kv_stop > q_start + 1:
            return False
        return self._all_near(q_start, q_stop, kv_start, kv_stop, kv_len)

    def _all_near(self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, kv_len: int) -> bool:
        """True when every key of the block is in the neighbourhood of every query, whatever causality says."""
        if self.before + self.after + 1 >= -(-kv_len // self.length):
            return True
        one_chunk = q_start // self.length == (q_stop - 1) // self.length
        spans = self.spans_near(q_start, q_stop, kv_len, kv_len)
        return one_chunk and any(start <= kv_start and kv_stop <= stop for start, stop in spans)

    def block_key(
        self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int
    ) -> tuple[int, ...] | None:
        if not self._all_near(q_start, q_stop, kv_start, kv_stop, kv_len):
            return None
        return (q_start - kv_start, q_stop - q_start, kv_stop - kv_start)  # causality alone

    def block_size(self, q_len: int, kv_len: int) -> int:
        return min(q_len, self.length)


@dataclass(frozen=True)
class SortedChunks(Chunks):
    """Chunks of keys that are sorted, as LSH attention sorts them by bucket; each query has its place among them.

    Queries are in their own order; ``order`` says where they stand: the query with index ``order[b, h, j]`` stands at
    key position ``start + j``. Keys are in sorted order; ``token`` says which query's token each of them is. With
    several hash rounds the keys of all rounds stand one after the other, and each round is a segment with its own
    ``start`` on the same keys: neighbourhoods reach into the round before, as in Reformer. A query never sees its own
    token: with shared queries and keys it would see little else (what it gets when it sees nothing at all is up to
    ``Attention.empty``).

    Attributes:
        start: key position of the first sorted query.
        order: ``(batch, heads, q_len)`` long, a permutation of the query indices per head.
        token: ``(batch, heads, kv_len)`` long, the query index each key belongs to; -1 hides the key (padding).
        causal: a query sees only keys whose token is before it.
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
                got = None if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                raise InvalidArgumentError(f"pattern {name}", got, f"torch.int64 {shape}")

    @property
    def query_order(self) -> Tensor | None:
        return self.order

    def block_size(self, q_len: int, kv_len: int) -> int:
        return min(q_len, self.length)

    def sorted_tensors(self) -> tuple[Tensor, Tensor]:
        """``order`` and ``token``, which every pattern in use has."""
        if self.order is None or self.token is None:
            raise InvalidArgumentError("pattern", f"{self} without order and token", "both")
        return self.order, self.token

    def batch_and_heads(self, device: torch.device) -> tuple[Tensor, Tensor]:
        batch, heads = self.sorted_tensors()[0].shape[:2]
        return (
            torch.arange(batch, device=device)[:, None, None, None],
            torch.arange(heads, device=device)[None, :, None, None],
        )

    def visible(self, query: Tensor, token: Tensor) -> Tensor:
        """True where a query index may see a key of a token index, near or not."""
        return (token >= 0) & ((token < query) if self.causal else (token != query))

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        order, token = self.sorted_tensors()
        places = torch.argsort(order, dim=-1)

        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return self.near(places[b, h, q] + self.start, kv, kv_len) & self.visible(q, token[b, h, kv])

        return mask

    def kv_spans(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[Span, ...]:
        """Key ranges in the neighbourhood of *sorted* queries ``q_start:q_stop``."""
        return self.spans_near(q_start + self.start, q_stop + self.start, kv_len, kv_len)

    def sees_all(self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int) -> bool:
        return False

    def block_key(
        self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int
    ) -> tuple[int, ...] | None:
        return None
