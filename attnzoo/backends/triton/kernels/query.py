"""The backward for queries: their gradients, ``delta``, and the gradients of the first and last entry of bias tables.

``delta`` is ``sum(out * grad_out)`` of each query. With the final ``out`` and softmax, the gradient of a score is
``p * (dp - delta)``, where ``p`` and ``dp`` depend on no other key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.kernels.arguments import BY_DISTANCE, BY_POSITION, HASHED
from attnzoo.backends.triton.kernels.gradients import load_softmax, score_gradients, weights
from attnzoo.backends.triton.kernels.scores import bias_positions, key_rows, query_places, query_rows, tile_scores
from attnzoo.backends.triton.kernels.spans import key_tiles, number, tile_start
from attnzoo.backends.triton.kernels.tiles import kept, load_rows, load_tile_of, store_rows


@triton.jit
def _segment(
    q, do, top, log_sum, row_delta, acc, ends, segment, numbers, settings, which, b, h, heads, q_len, q0,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NEEDS_ENDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys of a segment to the query gradient. Write the gradients of both ends of its table to ``ends``."""
    index = q0 + tl.arange(0, BLOCK_M)
    exists = index < q_len
    rows = query_rows(segment, b, h, heads, index, q_len)
    places, place, last = query_places(segment, numbers, b, h, heads, rows, q0, q_len, BLOCK_M)
    positions = bias_positions(segment, numbers, b, rows, exists, q_len)
    lowest, highest = tl.min(positions, 0), tl.max(positions, 0)
    first1, count1, first2, count2 = key_tiles(segment, numbers, b, place, last, BLOCK_N)
    kv_head = h // segment.group
    low = tl.zeros([BLOCK_M], tl.float32)
    high = tl.zeros([BLOCK_M], tl.float32)
    for i in range(0, count1 + count2):
        k0 = tile_start(i, first1, count1, first2, BLOCK_N)
        columns = k0 + tl.arange(0, BLOCK_N)
        inside = columns < number(numbers.kv_len)
        keys = key_rows(segment, numbers, b, kv_head, heads, columns, inside)
        k = load_tile_of(segment.key, b, kv_head, k0, keys, inside, segment.kind == HASHED, BLOCK_N, DIM, BLOCK_D)
        scores, slope = tile_scores(
            q, k, segment, numbers, settings, b, h, heads, q_len, rows, exists, places, positions, lowest, highest,
            place, last, keys, k0, BLOCK_M, BLOCK_N, True, False, PRECISION,
        )  # fmt: skip
        p = weights(scores, top[:, None], log_sum[:, None], settings)
        v = load_tile_of(
            segment.value, b, kv_head, k0, keys, inside, segment.kind == HASHED, BLOCK_N, VALUE_DIM, BLOCK_V
        )
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        keep = 0
        if settings.has_dropout:
            keep = kept(settings, which, b * heads + h, rows, columns, False)
        ds = score_gradients(p, dp, row_delta[:, None], keep, settings)
        acc = tl.dot((ds * slope if settings.has_cap else ds).to(k.dtype), k, acc, input_precision=PRECISION)
        if NEEDS_ENDS and (segment.bias == BY_DISTANCE or segment.bias == BY_POSITION):
            entry, end = k0 + number(numbers.zero), number(numbers.size) - 1
            if entry - highest >= end:
                high += tl.sum(ds, 1)
            elif entry + BLOCK_N - 1 - lowest <= 0:
                low += tl.sum(ds, 1)
            elif (entry + BLOCK_N - 1 - lowest >= end) | (entry - highest <= 0):
                entries = (columns + number(numbers.zero))[None, :] - positions[:, None]
                high += tl.sum(tl.where(entries >= end, ds, 0.0), 1)
                low += tl.sum(tl.where((entries <= 0) & (entries < end), ds, 0.0), 1)
    if NEEDS_ENDS:
        tl.store(ends, tl.sum(low, 0))
        tl.store(ends + 1, tl.sum(high, 0))
    return acc


@triton.jit(do_not_specialize=["heads", "q_len", "first_segment"])
def query_kernel(
    query, out, grad_out, grad_query, earlier, softmax, delta, ends, settings, segments, numbers, heads, q_len,
    first_segment,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NEEDS_ENDS: tl.constexpr, IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``delta`` and ``grad_query`` of a tile of queries, and ``ends`` ``(segments, batch * heads, tiles, 2)``.

    ``earlier`` is the gradient of the launches before, without the scale.
    """
    blocks = tl.cdiv(q_len, BLOCK_M)
    head = tl.program_id(0) // blocks
    b, h = head // heads, head % heads
    block = blocks - 1 - tl.program_id(0) % blocks
    q0 = block * BLOCK_M
    index = q0 + tl.arange(0, BLOCK_M)
    exists = index < q_len
    rows = query_rows(segments[0], b, h, heads, index, q_len)
    q = load_rows(query, b, h, rows, exists, DIM, BLOCK_D)
    if settings.sign != 1:
        q = q * settings.sign
    do = load_rows(grad_out, b, h, rows, exists, VALUE_DIM, BLOCK_V)
    of_row = head.to(tl.int64) * q_len + rows
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if IS_FIRST:
        o = load_rows(out, b, h, rows, exists, VALUE_DIM, BLOCK_V)
        row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta + of_row, row_delta, mask=exists)
    else:
        row_delta = tl.load(delta + of_row, mask=exists, other=0.0)
        acc += load_rows(earlier, b, h, rows, exists, DIM, BLOCK_D)
    top, log_sum = load_softmax(softmax, of_row, exists)
    for i in tl.static_range(len(segments)):
        number_of_heads = tl.num_programs(0) // blocks
        place = ends + 2 * ((first_segment + i) * number_of_heads * blocks + head * blocks + block) if NEEDS_ENDS else 0
        acc = _segment(
            q, do, top, log_sum, row_delta, acc, place, segments[i], numbers[i], settings, first_segment + i, b, h,
            heads, q_len, q0, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, NEEDS_ENDS, PRECISION,
        )  # fmt: skip
    if IS_LAST:
        acc = acc * (settings.scale * settings.sign)
    store_rows(grad_query, b, h, rows, exists, acc, DIM, BLOCK_D)
