"""Patterns: who sees whom, as plain frozen data.

A pattern states its truth once, as a FlexAttention ``mask_mod(b, h, q, kv) -> bool``, and beside it its *structure*:
which spans of keys a block of queries can see at all (so that a kernel may skip the rest), and whether a block is
visible without a mask. Indices are positions in the query and key sequences; ``offset`` is the key position of query 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from attnzoo.errors import InvalidArgumentError

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Span = tuple[int, int]


def _check_count(argument: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidArgumentError(argument, repr(value), f"an integer >= {minimum}")


@dataclass(frozen=True)
class Pattern:
    """Base class. ``q_len`` and ``kv_len`` are the lengths of the whole query and key sequences, in tokens."""

    @property
    def local(self) -> bool:
        """True when a query sees a bounded number of keys, however long the sequence is."""
        return False

    def check(self, q_len: int, kv_len: int) -> None:
        """Raise :class:`InvalidArgumentError` if the pattern has no meaning for these lengths."""

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        """The truth: a function of broadcastable index tensors, True where query ``q`` sees key ``kv``."""
        raise NotImplementedError

    def kv_spans(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[Span, ...]:
        """Disjoint ``(start, stop)`` key ranges outside which queries ``q_start:q_stop`` see nothing."""
        return ((0, kv_len),)

    def sees_all(self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int) -> bool:
        """True when every query of the block certainly sees every key of the block: no mask is needed."""
        return False

    def block_size(self, q_len: int, kv_len: int) -> int:
        """Number of queries a blocked kernel had best take at once."""
        return q_len

    def block_key(
        self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int
    ) -> tuple[int, ...] | None:
        """A key such that blocks of equal key have equal masks (so that a kernel may reuse one), or None: no promise."""
        return None


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key."""

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        return lambda b, h, q, kv: (q >= 0) & (kv >= 0)

    def sees_all(self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int) -> bool:
        return True


@dataclass(frozen=True)
class _Aligned(Pattern):
    """Patterns by relative position. ``offset=None`` aligns the last query with the last key (bottom right)."""

    def shift(self, q_len: int, kv_len: int) -> int:
        """Key position of query 0."""
        offset: int | None = getattr(self, "offset", None)
        return kv_len - q_len if offset is None else offset

    def block_key(
        self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int
    ) -> tuple[int, ...]:
        return (q_start + self.shift(q_len, kv_len) - kv_start, q_stop - q_start, kv_stop - kv_start)


@dataclass(frozen=True)
class Causal(_Aligned):
    """Query ``i`` sees keys up to its own position ``i + offset``.

    The default offset aligns bottom right, as FlashAttention does: new tokens on a longer cache see all of the cache.
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
        InvalidArgumentError: a side is negative, or both are zero.
    """

    left: int
    right: int
    offset: int | None = None

    def __post_init__(self) -> None:
        _check_count("window left", self.left, 0)
        _check_count("window right", self.right, 0)
        if self.left + self.right == 0:
            raise InvalidArgumentError("window", "left=0, right=0", "a window > 0 on at least one side")

    @property
    def local(self) -> bool:
        return True

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
        return min(q_len, max(64, min(256, (self.left + self.right) // 8)))


@dataclass(frozen=True)
class Chunks(Pattern):
    """Chunked attention of Reformer (Kitaev et al. 2020, arXiv:2001.04451).

    The sequence is cut into chunks of ``length`` tokens; a query sees its own chunk, ``before`` chunks before and
    ``after`` chunks after it. The neighbourhood wraps around the end of the sequence; with ``causal`` a query sees
    only keys up to its own position, so that nothing wrapped from the end is visible.

    The last chunk may be partial. Each key is seen at most once, however often the neighbourhood wraps onto it.

    Raises:
        InvalidArgumentError: ``length < 1``, a negative neighbour count, or (in use) query and key lengths that differ.
    """

    length: int
    before: int = 1
    after: int = 0
    causal: bool = False

    def __post_init__(self) -> None:
        _check_count("chunk length", self.length, 1)
        _check_count("chunks before", self.before, 0)
        _check_count("chunks after", self.after, 0)

    @property
    def local(self) -> bool:
        return True

    def check(self, q_len: int, kv_len: int) -> None:
        if q_len != kv_len:
            raise InvalidArgumentError(
                "pattern", f"{self} with {q_len} queries and {kv_len} keys", "as many queries as keys"
            )

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        count, length, before, after = -(-kv_len // self.length), self.length, self.before, self.after

        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            ahead = (kv // length - q // length) % count  # chunks to walk forwards, around the end, to reach the key
            visible = (ahead <= after) | (ahead >= count - before)
            return visible & (kv <= q) if self.causal else visible

        return mask

    def kv_spans(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[Span, ...]:
        count = -(-kv_len // self.length)
        first, last = q_start // self.length - self.before, (q_stop - 1) // self.length + self.after
        if last - first + 1 >= count:
            chunks = set(range(count))
        else:
            chunks = {chunk % count for chunk in range(first, last + 1)}
        limit = q_stop if self.causal else kv_len
        spans: list[Span] = []
        for chunk in sorted(chunks):
            start, stop = chunk * self.length, min(limit, (chunk + 1) * self.length)
            if start >= stop:
                continue
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        return tuple(spans)

    def sees_all(self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int) -> bool:
        one_chunk = q_start // self.length == (q_stop - 1) // self.length
        return one_chunk and (not self.causal or kv_stop <= q_start + 1)

    def block_size(self, q_len: int, kv_len: int) -> int:
        return min(q_len, self.length)
