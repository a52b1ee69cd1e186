"""The weights and the gradients of scores, from the output and the softmax of the forward."""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.kernels.scores import tile_scores
from attnzoo.backends.triton.kernels.spans import number
from attnzoo.backends.triton.kernels.tiles import LOG2_E, kept, load_rows, load_tile, power_of_two


@triton.jit
def load_softmax(softmax, of_row, exists):
    """The maximum and the logarithm of the sum of rows. The weights of a row that does not exist are 0."""
    top = tl.load(softmax.top + of_row, mask=exists, other=0.0)
    return top, tl.load(softmax.log_sum + of_row, mask=exists, other=float("inf"))


@triton.jit
def weights(scores, top, log_sum, settings):
    """The softmax weights of scores."""
    return power_of_two((scores - top) * (settings.scale * LOG2_E) - log_sum)


@triton.jit
def score_gradients(p, dp, delta, keep, settings):
    """The gradients of scores, from the weights ``p``, the products of values and output gradients, and ``delta``."""
    if settings.has_dropout:
        dp = tl.where(keep, dp / (1.0 - settings.dropout), 0.0)
    return p * (dp - delta)


@triton.jit
def tile_gradients(
    query, grad_out, softmax, delta, settings, segment, numbers, b, h, heads, q_len, rows, positions, lowest, highest,
    place, last, k0, which,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the scores of a tile, in a segment that keeps the order of the queries."""
    exists = rows < q_len
    q = load_rows(query, b, h, rows, exists, DIM, BLOCK_D)
    if settings.sign != 1:
        q = q * settings.sign
    columns = k0 + tl.arange(0, BLOCK_N)
    inside = (columns >= 0) & (columns < number(numbers.kv_len))
    kv_head = h // segment.group
    k = load_tile(segment.key, b, kv_head, k0, inside, BLOCK_N, DIM, BLOCK_D)
    scores, _ = tile_scores(
        q, k, segment, numbers, settings, b, h, heads, q_len, rows, exists, rows, positions, lowest, highest, place,
        last, columns, k0, BLOCK_M, BLOCK_N, True, False, PRECISION,
    )  # fmt: skip
    of_row = tl.cast(b * heads + h, tl.int64) * q_len + rows
    top, log_sum = load_softmax(softmax, of_row, exists)
    p = weights(scores, top[:, None], log_sum[:, None], settings)
    do = load_rows(grad_out, b, h, rows, exists, VALUE_DIM, BLOCK_V)
    v = load_tile(segment.value, b, kv_head, k0, inside, BLOCK_N, VALUE_DIM, BLOCK_V)
    dp = tl.dot(do, v.T, input_precision=PRECISION)
    row_delta = tl.load(delta + of_row, mask=exists, other=0.0)
    keep = 0
    if settings.has_dropout:
        keep = kept(settings, which, b * heads + h, rows, columns, False)
    return score_gradients(p, dp, row_delta[:, None], keep, settings)
