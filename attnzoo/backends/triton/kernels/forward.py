"""The forward: one softmax over all segments, in one pass over the visible tiles of keys (Dao et al. 2022, 2205.14135).

A program computes a tile of queries. If segments sort the queries, several launches compute parts of the keys: each
continues the softmax of the launch before, whose output and log-sum-exp it reads from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.kernels.arguments import HASHED
from attnzoo.backends.triton.kernels.scores import bias_positions, key_rows, query_places, query_rows, tile_scores
from attnzoo.backends.triton.kernels.spans import key_tiles, number, tile_start
from attnzoo.backends.triton.kernels.tiles import FLOOR, LOG2_E, kept, load_rows, load_tile_of, power_of_two, store_rows


@triton.jit
def _attend(
    q, top, total, acc, segment, numbers, which, b, h, heads, q_len, q0, factor, inverse, seed, dropout,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys of a segment to the softmax: maximum ``top``, sum ``total`` and weighted values ``acc``."""
    index = q0 + tl.arange(0, BLOCK_M)
    exists = index < q_len
    rows = query_rows(segment, b, h, heads, index, q_len)
    places, place, last = query_places(segment, numbers, b, h, heads, rows, q0, q_len, BLOCK_M)
    positions = bias_positions(segment, numbers, b, rows, exists, q_len)
    lowest, highest = tl.min(positions, 0), tl.max(positions, 0)
    first1, count1, first2, count2 = key_tiles(segment, numbers, b, place, last, BLOCK_N)
    kv_head = h // segment.group
    for i in range(0, count1 + count2):
        k0 = tile_start(i, first1, count1, first2, BLOCK_N)
        columns = k0 + tl.arange(0, BLOCK_N)
        inside = columns < number(numbers.kv_len)
        keys = key_rows(segment, numbers, b, kv_head, heads, columns, inside)
        k = load_tile_of(segment.key, b, kv_head, k0, keys, inside, segment.kind == HASHED, BLOCK_N, DIM, BLOCK_D)
        scores = tile_scores(
            q, k, segment, numbers, b, h, heads, q_len, rows, exists, places, positions, lowest, highest, place, last,
            keys, k0, inverse, BLOCK_M, BLOCK_N, True, False, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1) * factor)
        p = power_of_two(scores * factor - higher[:, None])
        alpha = power_of_two(top - higher)
        top, total = higher, total * alpha + tl.sum(p, 1)
        if DROPOUT:
            keep = kept(seed, which, b * heads + h, rows, columns, dropout, False)
            p = tl.where(keep, p / (1.0 - dropout), 0.0)
        v = load_tile_of(
            segment.value, b, kv_head, k0, keys, inside, segment.kind == HASHED, BLOCK_N, VALUE_DIM, BLOCK_V
        )
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return top, total, acc


@triton.jit(do_not_specialize=["heads", "q_len", "first_segment"])
def forward_kernel(
    query, out, earlier, lse, query_mask, empty, seed, segments, numbers, heads, q_len, first_segment, scale, dropout,
    SIGN: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, HAS_QUERY_MASK: tl.constexpr,
    HAS_EMPTY: tl.constexpr, IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``out`` and ``lse`` (base 2, ``inf`` for a query that sees no key or is padding) of a tile of queries.

    ``earlier`` is the output of the launch before. A launch that is not the last writes an output and a ``lse`` to
    continue from, without regard to padding queries.
    """
    blocks = tl.cdiv(q_len, BLOCK_M)
    head = tl.program_id(0) // blocks
    b, h = head // heads, head % heads
    # The last queries of causal attention see the most keys, so they start first.
    q0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    index = q0 + tl.arange(0, BLOCK_M)
    exists = index < q_len
    rows = query_rows(segments[0], b, h, heads, index, q_len)
    q = load_rows(query, b, h, rows, exists, DIM, BLOCK_D)
    if SIGN != 1:  # a negative scale is a positive scale with negative queries
        q = q * SIGN
    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    lse += head.to(tl.int64) * q_len
    if not IS_FIRST:
        lse_before = tl.load(lse + rows, mask=exists, other=float("inf"))
        has_key = lse_before != float("inf")  # NaN counts as a key, and makes the row NaN
        top = tl.where(has_key, lse_before, FLOOR)
        total = tl.where(has_key, 1.0, 0.0)
        acc += load_rows(earlier, b, h, rows, exists & has_key, VALUE_DIM, BLOCK_V)
    for i in tl.static_range(len(segments)):
        top, total, acc = _attend(
            q, top, total, acc, segments[i], numbers[i], first_segment + i, b, h, heads, q_len, q0,
            scale * LOG2_E, 1.0 / scale, seed, dropout, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, DROPOUT,
            PRECISION,
        )  # fmt: skip
    has_key = total != 0.0  # NaN counts as a key
    total = tl.where(has_key, total, 1.0)
    result = acc / total[:, None]
    if IS_LAST:
        is_query = exists
        if HAS_QUERY_MASK:
            is_query = exists & (tl.load(query_mask + tl.cast(b, tl.int64) * q_len + rows, mask=exists, other=0) != 0)
        if HAS_EMPTY:
            other = load_rows(empty, b, h, rows, is_query & (has_key == 0), VALUE_DIM, BLOCK_V).to(tl.float32)
            result += other
        has_key = has_key & is_query
        result = tl.where(is_query[:, None], result, 0.0)
    store_rows(out, b, h, rows, exists, result, VALUE_DIM, BLOCK_V)
    tl.store(lse + rows, tl.where(has_key, top + tl.log2(total), float("inf")), mask=exists)
