"""Which tiles of keys a tile of queries may see, and which tiles of queries may see a tile of keys.

In both cases the tiles form at most two runs, because chunks wrap around at the ends of the sequence. The two runs
share no tile. A function returns the index of the first tile and the number of tiles of each run. Tiles start at
multiples of their size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.kernels.arguments import BAND, CHUNKS, HASHED


@triton.jit
def number(encoded):
    """The integer that :func:`~attnzoo.backends.triton.kernels.arguments.encoded` has encoded."""
    return encoded >> 2


@triton.jit
def _runs(start1, stop1, start2, stop2, BLOCK: tl.constexpr):
    """The tiles of two spans of indices. The second span must lie below the first, or be empty."""
    first1 = start1 // BLOCK
    count1 = tl.where(stop1 > start1, tl.cdiv(stop1, BLOCK) - first1, 0)
    first2 = start2 // BLOCK
    # A tile that both spans share belongs to the first span.
    stop2 = tl.where(count1 > 0, tl.minimum(tl.cdiv(stop2, BLOCK), first1), tl.cdiv(stop2, BLOCK))
    count2 = tl.where(stop2 > first2, stop2 - first2, 0)
    return first1, count1, first2, count2


@triton.jit
def _chunk_spans(first, last, length, count):
    """The places in the chunks ``first`` to ``last``, which may be below 0 or above ``count``, as two spans."""
    whole = last - first + 1 >= count
    head = tl.where(whole, 0, (first + count) % count)
    tail = tl.where(whole, count - 1, (last + count) % count)
    wraps = head > tail
    stop1 = tl.where(wraps, count, tail + 1) * length
    stop2 = tl.where(wraps, tail + 1, 0) * length
    return head * length, stop1, 0 * length, stop2


@triton.jit
def _chunk_start(starts, row, chunk, kv_len):
    """The start of a chunk, which may be below 0 or above the last chunk, in a row of a table of starts."""
    chunk = tl.minimum(tl.maximum(chunk, 0), kv_len)
    return tl.load(starts + tl.cast(row, tl.int64) * (kv_len + 1) + chunk)


@triton.jit
def key_tiles(segment, numbers, b, place, last, BLOCK_N: tl.constexpr):
    """The tiles of keys that the queries at the places ``place`` to ``last`` of a sample may see."""
    kv_len = number(numbers.kv_len)
    if segment.kind == BAND:
        start = tl.maximum(place + number(numbers.lowest), 0)
        stop = tl.minimum(last + number(numbers.highest) + 1, kv_len)
        return _runs(start, stop, 0, 0, BLOCK_N)
    elif segment.kind == HASHED:
        first_chunk = place - number(numbers.before)
        start = _chunk_start(segment.hashes.starts, b, first_chunk, kv_len)
        stop = _chunk_start(segment.hashes.starts, b, last - number(numbers.before) + number(numbers.reach) + 1, kv_len)
        return _runs(start, stop, 0, 0, BLOCK_N)
    else:
        length, before, count = number(numbers.length), number(numbers.before), number(numbers.chunks)
        first_chunk = place // length - before
        last_chunk = last // length - before + number(numbers.reach)
        start1, stop1, start2, stop2 = _chunk_spans(first_chunk, last_chunk, length, count)
        stop1 = tl.minimum(stop1, kv_len)
        if segment.causal and segment.kind == CHUNKS:
            stop1, stop2 = tl.minimum(stop1, last + 1), tl.minimum(stop2, last + 1)
        return _runs(start1, stop1, start2, stop2, BLOCK_N)


@triton.jit
def query_tiles(segment, numbers, b, h, heads, key, last, q_len, BLOCK_M: tl.constexpr):
    """The tiles of queries of a head, in the order of the segment, that may see the keys ``key`` to ``last``."""
    if segment.kind == BAND:
        start = tl.maximum(key - number(numbers.highest), 0)
        stop = tl.minimum(last - number(numbers.lowest) + 1, q_len)
        return _runs(start, stop, 0, 0, BLOCK_M)
    elif segment.kind == HASHED:
        kv_len = number(numbers.kv_len)
        chunks = segment.hashes.chunks + tl.cast(b, tl.int64) * kv_len
        first_chunk = tl.load(chunks + key).to(tl.int32) + number(numbers.before) - number(numbers.reach)
        last_chunk = tl.load(chunks + last).to(tl.int32) + number(numbers.before)
        start = _chunk_start(segment.hashes.query_starts, b * heads + h, first_chunk, kv_len)
        stop = _chunk_start(segment.hashes.query_starts, b * heads + h, last_chunk + 1, kv_len)
        first, count, _, _ = _runs(start, stop, 0, 0, BLOCK_M)
        return first, count, first + count, 0 * count  # a further tile is none of the first
    else:
        length, before, count = number(numbers.length), number(numbers.before), number(numbers.chunks)
        first_chunk = key // length + before - number(numbers.reach)
        last_chunk = last // length + before
        start1, stop1, start2, stop2 = _chunk_spans(first_chunk, last_chunk, length, count)
        if segment.causal and segment.kind == CHUNKS:
            start1, start2 = tl.maximum(start1, key), tl.maximum(start2, key)
        # The queries of a hash round have the places from ``first`` on.
        first = number(numbers.start)
        start1, stop1 = tl.maximum(start1 - first, 0), tl.minimum(stop1 - first, q_len)
        start2, stop2 = tl.maximum(start2 - first, 0), tl.minimum(stop2 - first, q_len)
        return _runs(start1, stop1, start2, stop2, BLOCK_M)


@triton.jit
def tile_start(i, first1, count1, first2, BLOCK: tl.constexpr):
    """The first index of tile ``i``. Tiles are numbered through two ranges of indices, the first range first."""
    return tl.where(i < count1, first1 + i, first2 + i - count1) * BLOCK
