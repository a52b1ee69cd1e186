"""The scores of a tile before scaling: ``q @ k`` plus the bias divided by the scale, or ``-inf`` at hidden keys.

A tile is ``[M, N]``, or ``[N, M]`` (transposed) in the kernel for keys and values. One branch per tile decides whether
the pattern may hide a key of the tile. If not, the tile skips the pattern. There is no such branch for key masks and
dense masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.kernels.arguments import (
    BAND,
    BY_POSITION,
    CHUNKS,
    DENSE_BIAS,
    NO_BIAS,
    SORTED,
)
from attnzoo.backends.triton.kernels.spans import number
from attnzoo.backends.triton.kernels.tiles import along_keys, along_queries, look_up, of_head


@triton.jit
def query_rows(segment, numbers, b, h, heads, index, q_len):
    """The rows of some queries, and their places among the keys. ``index`` counts queries in the segment's order."""
    if segment.kind == SORTED:
        order = segment.order + tl.cast(b * heads + h, tl.int64) * q_len
        rows = tl.load(order + index, mask=index < q_len, other=0).to(tl.int32)
        return rows, index + number(numbers.start)
    else:
        return index, index


@triton.jit
def bias_positions(segment, numbers, b, rows, exists, q_len):
    """The position of each query for the look-up in a bias table."""
    if segment.bias == BY_POSITION:
        return tl.load(segment.positions + tl.cast(b, tl.int64) * q_len + rows, mask=exists, other=0).to(tl.int32)
    else:
        return rows


@triton.jit
def _chunks_hide(numbers, place, last, k0, BLOCK_N: tl.constexpr):
    """Whether the chunks may hide a key of the tile from one of the queries at the places ``place`` to ``last``."""
    length, reach, count = number(numbers.length), number(numbers.reach), number(numbers.chunks)
    chunk = k0 // length
    ahead = _ahead(chunk - place // length, numbers)
    several = (place // length != last // length) | (ahead + (k0 + BLOCK_N - 1) // length - chunk > reach)
    return several & (reach + 1 < count)


@triton.jit
def _ahead(chunks, numbers):
    """How many chunks a key is after the first chunk that the query sees, modulo the number of chunks."""
    count = number(numbers.chunks)
    ahead = chunks + number(numbers.before)
    ahead = tl.where(ahead < 0, ahead + count, ahead)
    return tl.where(ahead >= count, ahead - count, ahead)


@triton.jit
def _hide_by_pattern(scores, segment, numbers, b, h, heads, rows, places, columns, inside, TRANSPOSED: tl.constexpr):
    row, place = along_queries(rows, TRANSPOSED), along_queries(places, TRANSPOSED)
    key, seen = along_keys(columns, TRANSPOSED), along_keys(inside, TRANSPOSED)
    if segment.kind == BAND:
        distance = key - place
        seen = seen & (distance >= number(numbers.lowest)) & (distance <= number(numbers.highest))
    else:
        length = number(numbers.length)
        chunks = along_keys(columns // length, TRANSPOSED) - along_queries(places // length, TRANSPOSED)
        seen = seen & (_ahead(chunks, numbers) <= number(numbers.reach))
        if segment.kind == CHUNKS and segment.causal:
            seen = seen & (key <= place)
    if segment.kind == SORTED:
        tokens = segment.token + tl.cast(b * heads + h, tl.int64) * number(numbers.kv_len)
        token = along_keys(tl.load(tokens + columns, mask=inside, other=-1).to(tl.int32), TRANSPOSED)
        if segment.causal:
            seen = seen & (token >= 0) & (token < row)
        else:
            seen = seen & (token >= 0) & (token != row)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _load_grid(grid, b, h, rows, exists, columns, inside, TRANSPOSED: tl.constexpr):
    row = along_queries(rows.to(tl.int64) * grid.row, TRANSPOSED)
    column = along_keys(columns.to(tl.int64) * grid.column, TRANSPOSED)
    mask = along_queries(exists, TRANSPOSED) & along_keys(inside, TRANSPOSED)
    return tl.load(of_head(grid, b, h) + row + column, mask=mask, other=0)


@triton.jit
def _table_bias(segment, numbers, h, positions, lowest, highest, k0, M: tl.constexpr, N: tl.constexpr,
                TRANSPOSED: tl.constexpr):  # fmt: skip
    """The bias of a tile from a table: a single value if all its keys are beyond the same end of the table.

    ``lowest`` and ``highest`` are the smallest and the largest of the positions.
    """
    table = segment.table + h * segment.table_head
    zero, last = number(numbers.zero), number(numbers.size) - 1
    if (k0 - highest + zero >= last) | (k0 + N - 1 - lowest + zero <= 0):
        value = tl.load(table + tl.minimum(tl.maximum(k0 - highest + zero, 0), last))
        bias = tl.zeros([N, M] if TRANSPOSED else [M, N], tl.float32) + value
    else:
        columns = k0 + tl.arange(0, N)
        index = along_keys(columns + zero, TRANSPOSED) - along_queries(positions, TRANSPOSED)
        bias = look_up(table, tl.minimum(tl.maximum(index, 0), last))
    return bias


@triton.jit
def tile_scores(
    q, k, segment, numbers, b, h, heads, rows, exists, places, positions, lowest, highest, place, last, k0, inverse,
    M: tl.constexpr, N: tl.constexpr, MASK_KEYS: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of the queries ``rows`` and the keys from ``k0`` on. ``k0`` may be negative.

    Args:
        rows, exists, places, positions: ``[M]``, of the queries: row, whether the row exists, place among the keys
            (:func:`query_rows`), position for the bias (:func:`bias_positions`).
        lowest, highest: the smallest and the largest position.
        place, last: the first and the last place.
        inverse: the inverse of the scale.
        MASK_KEYS: whether to hide keys by the key mask.
    """
    columns = k0 + tl.arange(0, N)
    inside = (columns >= 0) & (columns < number(numbers.kv_len))
    if segment.bias == NO_BIAS:
        if TRANSPOSED:
            scores = tl.dot(k, q.T, input_precision=PRECISION)
        else:
            scores = tl.dot(q, k.T, input_precision=PRECISION)
    else:
        if segment.bias == DENSE_BIAS:
            bias = _load_grid(segment.dense, b, h, rows, exists, columns, inside, TRANSPOSED).to(tl.float32) * inverse
        else:
            bias = _table_bias(segment, numbers, h, positions, lowest, highest, k0, M, N, TRANSPOSED)
        if TRANSPOSED:
            scores = tl.dot(k, q.T, bias, input_precision=PRECISION)
        else:
            scores = tl.dot(q, k.T, bias, input_precision=PRECISION)
    hides = (k0 < 0) | (k0 + N > number(numbers.kv_len))
    if segment.kind == BAND:
        hides = hides | (k0 - last < number(numbers.lowest)) | (k0 + N - 1 - place > number(numbers.highest))
    elif segment.kind == CHUNKS:
        hides = hides | _chunks_hide(numbers, place, last, k0, N)
        if segment.causal:
            hides = hides | (k0 + N - 1 > place)
    else:
        hides = k0 >= 0  # a query does not see the key of the same token
    if hides:
        scores = _hide_by_pattern(scores, segment, numbers, b, h, heads, rows, places, columns, inside, TRANSPOSED)
    if segment.has_key_mask and MASK_KEYS:
        address = segment.key_mask + tl.cast(b, tl.int64) * number(numbers.kv_len) + columns
        seen = tl.load(address, mask=inside, other=0) != 0
        scores = tl.where(along_keys(seen, TRANSPOSED), scores, float("-inf"))
    if segment.has_mask:
        seen = _load_grid(segment.mask, b, h, rows, exists, columns, inside, TRANSPOSED) != 0
        scores = tl.where(seen, scores, float("-inf"))
    return scores
