"""The forward: one softmax over all segments, in one pass over the visible tiles (Dao et al. 2022, arXiv:2205.14135).

A program computes a tile of queries. If segments sort the queries, several launches each compute a part of the keys. A
launch reads the output and the sums of the softmax of the launch before from memory, and continues this softmax.
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
    q, top, total, acc, segment, numbers, settings, which, b, h, heads, q_len, q0,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
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
    factor = settings.scale * LOG2_E
    for i in range(0, count1 + count2):
        k0 = tile_start(i, first1, count1, first2, BLOCK_N)
        columns = k0 + tl.arange(0, BLOCK_N)
        inside = columns < number(numbers.kv_len)
        keys = key_rows(segment, numbers, b, kv_head, heads, columns, inside)
        k = load_tile_of(segment.key, b, kv_head, k0, keys, inside, segment.kind == HASHED, BLOCK_N, DIM, BLOCK_D)
        scores, _ = tile_scores(
            q, k, segment, numbers, settings, b, h, heads, q_len, rows, exists, places, positions, lowest, highest,
            place, last, keys, k0, BLOCK_M, BLOCK_N, True, False, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        # The difference comes before the factor. A fused multiply-add would leave the rounding error of the product of
        # a large score in the exponent.
        p = power_of_two((scores - higher[:, None]) * factor)
        alpha = power_of_two((top - higher) * factor)
        top, total = higher, total * alpha + tl.sum(p, 1)
        if settings.has_dropout:
            keep = kept(settings, which, b * heads + h, rows, columns, False)
            p = tl.where(keep, p / (1.0 - settings.dropout), 0.0)
        v = load_tile_of(
            segment.value, b, kv_head, k0, keys, inside, segment.kind == HASHED, BLOCK_N, VALUE_DIM, BLOCK_V
        )
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return top, total, acc


@triton.jit(do_not_specialize=["heads", "q_len", "first_segment"])
def forward_kernel(
    query, out, earlier, softmax, query_mask, empty, settings, segments, numbers, heads, q_len, first_segment,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, HAS_EMPTY: tl.constexpr, IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``out`` and ``softmax`` of a tile of queries.

    ``earlier`` is the output of the launch before. A launch that is not the last writes sums to continue from: the sum
    of weighted values to ``out``, and the sum of weights, without its logarithm, to ``softmax``.
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
    if settings.sign != 1:  # a negative scale is a positive scale with negative queries
        q = q * settings.sign
    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    of_row = head.to(tl.int64) * q_len + rows
    if not IS_FIRST:
        top = tl.load(softmax.top + of_row, mask=exists, other=FLOOR)
        total = tl.load(softmax.log_sum + of_row, mask=exists, other=0.0)
        acc += load_rows(earlier, b, h, rows, exists, VALUE_DIM, BLOCK_V)
    for i in tl.static_range(len(segments)):
        top, total, acc = _attend(
            q, top, total, acc, segments[i], numbers[i], settings, first_segment + i, b, h, heads, q_len, q0,
            DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    if IS_LAST:
        has_key = total != 0.0  # NaN counts as a key, and makes the row NaN
        total = tl.where(has_key, total, 1.0)
        acc = acc / total[:, None]
        is_query = exists
        if HAS_QUERY_MASK:
            is_query = exists & (tl.load(query_mask + tl.cast(b, tl.int64) * q_len + rows, mask=exists, other=0) != 0)
        if HAS_EMPTY:
            acc += load_rows(empty, b, h, rows, is_query & (has_key == 0), VALUE_DIM, BLOCK_V).to(tl.float32)
        acc = tl.where(is_query[:, None], acc, 0.0)
        total = tl.where(has_key & is_query, tl.log2(total), float("inf"))
    store_rows(out, b, h, rows, exists, acc, VALUE_DIM, BLOCK_V)
    tl.store(softmax.top + of_row, top, mask=exists)
    tl.store(softmax.log_sum + of_row, total, mask=exists)
