"""The arguments that all kernels share, as named tuples: tensors with strides, and one record per segment.

Triton compiles a kernel again for each value that a ``constexpr`` field takes. It would also compile again for integers
that are 1 or a multiple of 16. For strides this is wanted, because aligned loads are faster. Lengths and window sizes
change from call to call, so :class:`Numbers` holds them in a form that never is 1 or a multiple of 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

# The kinds of patterns. Triton accepts only numbers in tuples.
BAND = tl.constexpr(0)  # a range of distances: Full, Causal, Window
CHUNKS = tl.constexpr(1)
SORTED = tl.constexpr(2)  # chunks of sorted keys; this kind and the next sort the queries
HASHED = tl.constexpr(3)  # chunks of a hash round

# The kinds of biases.
NO_BIAS = tl.constexpr(0)
BY_DISTANCE = tl.constexpr(1)  # a table, read at key index - query index
BY_POSITION = tl.constexpr(2)  # a table, read at key index - position of the query
DENSE_BIAS = tl.constexpr(3)


class Rows(NamedTuple):
    """A tensor ``(batch, heads, length, dim)`` whose last dimension is contiguous."""

    data: Any
    batch: int  # strides
    head: int
    row: int


class Softmax(NamedTuple):
    """The softmax of each query, each ``(batch, heads, q_len)`` float32.

    A log-sum-exp in a single number would lose the sum where scores are large, and the sum decides the weights.
    """

    top: Any  # the largest score, in units of q @ k
    log_sum: Any  # log2(sum(exp(scale * (score - top)))), inf for a query that sees no key, or is padding


class Settings(NamedTuple):
    """What is the same for all segments."""

    scale: float
    cap: float  # the softcap in units of q @ k
    dropout: float
    seed: Any  # (1,) int64
    sign: Any  # of the scale
    has_cap: Any
    has_dropout: Any


class Grid(NamedTuple):
    """A tensor ``(batch, heads, q_len, kv_len)`` with any strides, 0 for broadcast dimensions."""

    data: Any
    batch: int
    head: int
    row: int
    column: int


class Hashes(NamedTuple):
    """The tables of a hash round (:class:`~attnzoo.backends.triton.hash_tables.HashTables`)."""

    keys: Any
    chunks: Any
    starts: Any
    query_chunks: Any
    key_chunks: Any
    query_starts: Any  # (batch, heads, kv_len + 1) int32, only for the gradients of keys and values


class Keys(NamedTuple):
    """A segment: tensors, strides, and compile-time properties. A missing tensor is the compile-time constant 0."""

    key: Rows
    value: Rows
    key_mask: Any  # (batch, kv_len) bool
    mask: Grid
    table: Any  # (heads or 1, size) float32, in units of q @ k
    table_head: int  # the stride of a head in the table
    positions: Any  # (batch, q_len) int64
    dense: Grid  # the values of a dense bias
    order: Any  # (batch, heads, q_len) int64
    token: Any  # (batch, heads, kv_len) int64
    hashes: Hashes
    # Triton reads constants only from these fields, not from those of a tuple in this tuple.
    kind: Any
    earlier: Any  # HASHED: the number of earlier rounds
    rounds: Any  # HASHED: the number of rounds in ``query_chunks`` and ``key_chunks``
    causal: Any  # whether chunks hide later keys
    has_key_mask: Any
    has_mask: Any
    bias: Any
    group: Any  # query heads per key head


class Numbers(NamedTuple):
    """The integers of a segment, each ``n`` as ``4 * n + 2`` (:func:`encoded`)."""

    kv_len: int
    lowest: int  # BAND: the lowest and the highest visible distance, key index - query index
    highest: int
    length: int  # CHUNKS, SORTED: the number of keys in a chunk
    before: (
        int  # the number of visible chunks before the chunk of the query; except HASHED: modulo the number of chunks
    )
    reach: int  # the number of visible chunks besides the first
    chunks: int  # the number of chunks
    start: int  # the place of the first query among the keys
    shift: int  # HASHED: the position of the first query
    apart: int  # HASHED: the smallest visible distance
    zero: int  # the table entry of a key at the index or position of the query
    size: int  # the number of table entries


def encoded(number: int) -> int:
    """Return the integer that stands for ``number`` in :class:`Numbers`."""
    return 4 * number + 2
