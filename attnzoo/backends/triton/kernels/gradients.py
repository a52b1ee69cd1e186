"""The gradients of scores, from the output and the log-sum-exp of the forward."""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.kernels.scores import tile_scores
from attnzoo.backends.triton.kernels.spans import number
from attnzoo.backends.triton.kernels.tiles import LOG2_E, kept, load_rows, load_tile, power_of_two


@triton.jit
def score_gradients(p, dp, delta, keep, dropout, DROPOUT: tl.constexpr):
    """The gradients of scores, from the weights ``p``, the products of values and output gradients, and ``delta``."""
    if DROPOUT:
        dp = tl.where(keep, dp / (1.0 - dropout), 0.0)
    return p * (dp - delta)


@triton.jit
def tile_gradients(
    query, grad_out, lse, delta, seed, segment, numbers, b, h, heads, q_len, rows, positions, lowest, highest, place,
    last, k0, which, scale, dropout,
    SIGN: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the scores of a tile, in a segment that keeps the order of the queries."""
    exists = rows < q_len
    q = load_rows(query, b, h, rows, exists, DIM, BLOCK_D)
    if SIGN != 1:
        q = q * SIGN
    columns = k0 + tl.arange(0, BLOCK_N)
    inside = (columns >= 0) & (columns < number(numbers.kv_len))
    kv_head = h // segment.group
    k = load_tile(segment.key, b, kv_head, k0, inside, BLOCK_N, DIM, BLOCK_D)
    scores = tile_scores(
        q, k, segment, numbers, b, h, heads, q_len, rows, exists, rows, positions, lowest, highest, place, last,
        columns, k0, 1.0 / scale, BLOCK_M, BLOCK_N, True, False, PRECISION,
    )  # fmt: skip
    of_row = tl.cast(b * heads + h, tl.int64) * q_len + rows
    row_lse = tl.load(lse + of_row, mask=exists, other=float("inf"))
    p = power_of_two(scores * (scale * LOG2_E) - row_lse[:, None])
    do = load_rows(grad_out, b, h, rows, exists, VALUE_DIM, BLOCK_V)
    v = load_tile(segment.value, b, kv_head, k0, inside, BLOCK_N, VALUE_DIM, BLOCK_V)
    dp = tl.dot(do, v.T, input_precision=PRECISION)
    row_delta = tl.load(delta + of_row, mask=exists, other=0.0)
    keep = 0
    if DROPOUT:
        keep = kept(seed, which, b * heads + h, rows, columns, dropout, False)
    return score_gradients(p, dp, row_delta[:, None], keep, dropout, DROPOUT)
