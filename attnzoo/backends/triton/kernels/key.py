"""The backward for the keys and values of one segment.

A program computes a tile of keys, and goes through the queries of all heads that share the key head. Each row of the
gradients belongs to one key. So the program ignores the key mask until the end, and then sets the gradients of hidden
keys to zero.

If there are too few tiles of keys to fill the GPU, several programs share the queries of a tile of keys, and the caller
adds their results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.kernels.arguments import BY_POSITION, HASHED, SORTED
from attnzoo.backends.triton.kernels.gradients import load_softmax, score_gradients, weights
from attnzoo.backends.triton.kernels.scores import bias_positions, key_rows, query_places, query_rows, tile_scores
from attnzoo.backends.triton.kernels.spans import number, query_tiles, tile_start
from attnzoo.backends.triton.kernels.tiles import (
    kept,
    load_rows,
    load_tile_of,
    store_rows,
)


@triton.jit(do_not_specialize=["heads", "q_len", "which", "shares", "batch"])
def key_kernel(
    query, grad_out, grad_key, grad_value, softmax, delta, settings, segment, numbers, heads, q_len, which, shares,
    batch,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``grad_key`` and ``grad_value`` ``(shares * batch, kv_heads, kv_len, dim)`` of a tile of keys.

    With ``ADDS``, add to them instead: other segments have the same keys.
    """
    kv_len = number(numbers.kv_len)
    share = tl.program_id(0) % shares
    tile = tl.program_id(0) // shares
    blocks = tl.cdiv(kv_len, BLOCK_N)
    head = tile // blocks
    kv_heads = heads // segment.group
    b, kv_head = head // kv_heads, head % kv_heads
    k0 = tile % blocks * BLOCK_N
    columns = k0 + tl.arange(0, BLOCK_N)
    inside = columns < kv_len
    last_key = tl.minimum(k0 + BLOCK_N, kv_len) - 1
    # Only in hash rounds the number of tiles depends on the head. The heads with fewer tiles also go through the tiles
    # after their last tile, whose queries see none of the keys.
    count = 0
    for h in range(kv_head * segment.group, (kv_head + 1) * segment.group):
        _, count1, _, count2 = query_tiles(segment, numbers, b, h, heads, k0, last_key, q_len, BLOCK_M)
        count = tl.maximum(count, count1 + count2)
    # A round of sorted chunks has the keys of all rounds, and sees a part of them. The others need no addition.
    if ADDS and segment.kind == SORTED and count == 0:
        return
    keys = key_rows(segment, numbers, b, kv_head, heads, columns, inside)
    k = load_tile_of(segment.key, b, kv_head, k0, keys, inside, segment.kind == HASHED, BLOCK_N, DIM, BLOCK_D)
    v = load_tile_of(segment.value, b, kv_head, k0, keys, inside, segment.kind == HASHED, BLOCK_N, VALUE_DIM, BLOCK_V)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for step in range(share, count * segment.group, shares):
        h = kv_head * segment.group + step // count
        first1, count1, first2, _ = query_tiles(segment, numbers, b, h, heads, k0, last_key, q_len, BLOCK_M)
        m0 = tile_start(step % count, first1, count1, first2, BLOCK_M)
        index = m0 + tl.arange(0, BLOCK_M)
        exists = index < q_len
        rows = query_rows(segment, b, h, heads, index, q_len)
        places, place, last = query_places(segment, numbers, b, h, heads, rows, m0, q_len, BLOCK_M)
        positions = bias_positions(segment, numbers, b, rows, exists, q_len)
        if segment.bias == BY_POSITION:
            lowest, highest = tl.min(positions, 0), tl.max(positions, 0)
        else:
            lowest, highest = m0, m0 + BLOCK_M - 1
        q = load_tile_of(query, b, h, m0, rows, exists, segment.kind >= SORTED, BLOCK_M, DIM, BLOCK_D)
        if settings.sign != 1:
            q = q * settings.sign
        of_row = tl.cast(b * heads + h, tl.int64) * q_len + rows
        top, log_sum = load_softmax(softmax, of_row, exists)
        scores, slope = tile_scores(
            q, k, segment, numbers, settings, b, h, heads, q_len, rows, exists, places, positions, lowest, highest,
            place, last, keys, k0, BLOCK_M, BLOCK_N, False, True, PRECISION,
        )  # fmt: skip
        p = weights(scores, top[None, :], log_sum[None, :], settings)
        do = load_tile_of(grad_out, b, h, m0, rows, exists, segment.kind >= SORTED, BLOCK_M, VALUE_DIM, BLOCK_V)
        row_delta = tl.load(delta + of_row, mask=exists, other=0.0)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        keep, dropped = 0, p
        if settings.has_dropout:
            keep = kept(settings, which, b * heads + h, rows, columns, True)
            dropped = tl.where(keep, p / (1.0 - settings.dropout), 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = score_gradients(p, dp, row_delta[None, :], keep, settings)
        if settings.has_cap:
            ds = ds * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if segment.has_key_mask:
        visible = tl.load(segment.key_mask + tl.cast(b, tl.int64) * kv_len + keys, mask=inside, other=0) != 0
        dk = tl.where(visible[:, None], dk, 0.0)
        dv = tl.where(visible[:, None], dv, 0.0)
    dk = dk * settings.scale
    sample = share * batch + b
    if ADDS:
        dk += load_rows(grad_key, sample, kv_head, keys, inside, DIM, BLOCK_D)
        dv += load_rows(grad_value, sample, kv_head, keys, inside, VALUE_DIM, BLOCK_V)
    store_rows(grad_key, sample, kv_head, keys, inside, dk, DIM, BLOCK_D)
    store_rows(grad_value, sample, kv_head, keys, inside, dv, VALUE_DIM, BLOCK_V)
