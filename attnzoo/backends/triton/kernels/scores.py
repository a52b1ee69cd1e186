"""The scores of a tile, with softcap and bias, in units of ``q @ k``. The scores of hidden keys are ``-inf``.

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
    HASHED,
    NO_BIAS,
    SORTED,
)
from attnzoo.backends.triton.kernels.spans import number
from attnzoo.backends.triton.kernels.tiles import FLOOR, along_keys, along_queries, look_up, of_head, tanh


@triton.jit
def query_rows(segment, b, h, heads, index, q_len):
    """The rows of the queries with these indices in the order of the segment."""
    if segment.kind >= SORTED:
        order = segment.order + tl.cast(b * heads + h, tl.int64) * q_len
        return tl.load(order + index, mask=index < q_len, other=0).to(tl.int32)
    else:
        return index


@triton.jit
def query_places(segment, numbers, b, h, heads, rows, q0, q_len, BLOCK_M: tl.constexpr):
    """The places among the keys of a tile of queries, the first place, and the last. For HASHED, a place is a chunk."""
    index = q0 + tl.arange(0, BLOCK_M)
    if segment.kind == HASHED:
        hashes = segment.hashes
        of_row = tl.cast(b * heads + h, tl.int64) * q_len + rows
        exists = index < q_len
        chunks = tl.load(hashes.query_chunks + of_row * segment.rounds + segment.earlier, mask=exists, other=0)
        return chunks, tl.min(tl.where(exists, chunks, number(numbers.kv_len)), 0), tl.max(chunks, 0)
    else:
        start = number(numbers.start)
        return index + start, q0 + start, tl.minimum(q0 + BLOCK_M, q_len) - 1 + start


@triton.jit
def key_rows(segment, numbers, b, kv_head, heads, columns, inside):
    """The rows of the keys at the places ``columns``."""
    if segment.kind == HASHED:
        keys = segment.hashes.keys + tl.cast(b * (heads // segment.group) + kv_head, tl.int64) * number(numbers.kv_len)
        return tl.load(keys + columns, mask=inside, other=0).to(tl.int32)
    else:
        return columns


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
def _is_near(numbers, key_chunks, query_chunks):
    ahead = key_chunks - query_chunks + number(numbers.before)
    return (ahead >= 0) & (ahead <= number(numbers.reach))


@triton.jit
def _seen_by_hash(
    segment, numbers, b, h, heads, q_len, rows, exists, places, columns, keys, inside, TRANSPOSED: tl.constexpr
):
    """Which keys of a tile a hash round shows: near by the hashes, not too close, and not near in an earlier round."""
    hashes, kv_len = segment.hashes, number(numbers.kv_len)
    chunks = tl.load(hashes.chunks + tl.cast(b, tl.int64) * kv_len + columns, mask=inside, other=0).to(tl.int32)
    seen = along_keys(inside, TRANSPOSED)
    seen = seen & _is_near(numbers, along_keys(chunks, TRANSPOSED), along_queries(places, TRANSPOSED))
    distance = along_queries(rows + number(numbers.shift), TRANSPOSED) - along_keys(keys, TRANSPOSED)
    if not segment.causal:
        distance = tl.abs(distance)
    seen = seen & (distance >= number(numbers.apart))
    kv_row = tl.cast(b * (heads // segment.group) + h // segment.group, tl.int64) * kv_len
    of_keys = hashes.key_chunks + (kv_row + keys) * segment.rounds
    of_queries = hashes.query_chunks + (tl.cast(b * heads + h, tl.int64) * q_len + rows) * segment.rounds
    for i in tl.static_range(segment.earlier):
        key_chunks = tl.load(of_keys + i, mask=inside, other=0)
        query_chunks = tl.load(of_queries + i, mask=exists, other=0)
        near = _is_near(numbers, along_keys(key_chunks, TRANSPOSED), along_queries(query_chunks, TRANSPOSED))
        seen = seen & (near == 0)
    return seen


@triton.jit
def _hide_by_pattern(
    scores, segment, numbers, b, h, heads, q_len, rows, exists, places, columns, keys, inside, TRANSPOSED: tl.constexpr
):
    row, place = along_queries(rows, TRANSPOSED), along_queries(places, TRANSPOSED)
    key, seen = along_keys(columns, TRANSPOSED), along_keys(inside, TRANSPOSED)
    if segment.kind == BAND:
        distance = key - place
        seen = seen & (distance >= number(numbers.lowest)) & (distance <= number(numbers.highest))
    elif segment.kind == HASHED:
        seen = _seen_by_hash(
            segment, numbers, b, h, heads, q_len, rows, exists, places, columns, keys, inside, TRANSPOSED
        )
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
def _load_grid(grid, b, h, rows, exists, keys, inside, TRANSPOSED: tl.constexpr):
    row = along_queries(rows.to(tl.int64) * grid.row, TRANSPOSED)
    column = along_keys(keys.to(tl.int64) * grid.column, TRANSPOSED)
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
    q, k, segment, numbers, settings, b, h, heads, q_len, rows, exists, places, positions, lowest, highest, place, last,
    keys, k0, M: tl.constexpr, N: tl.constexpr, MASK_KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of the queries ``rows`` and the keys from ``k0`` on. ``k0`` may be negative.

    The second result is the derivative of the scores by ``q @ k`` if there is a softcap. Otherwise it is meaningless.

    Args:
        rows, exists, places, positions: ``[M]``, of the queries: row, whether the row exists, place among the keys
            (:func:`query_places`), position for the bias (:func:`bias_positions`).
        lowest, highest: the smallest and the largest position.
        place, last: the first and the last place.
        keys: ``[N]``, the rows of the keys (:func:`key_rows`).
        MASK_KEYS: whether to hide keys by the key mask.
    """
    columns = k0 + tl.arange(0, N)
    inside = (columns >= 0) & (columns < number(numbers.kv_len))
    if segment.bias == DENSE_BIAS:
        bias = _load_grid(segment.dense, b, h, rows, exists, keys, inside, TRANSPOSED).to(tl.float32)
        # Models hide keys with the lowest number, which must not become -inf.
        bias = tl.where(bias >= FLOOR, tl.maximum(bias / settings.scale, FLOOR), bias)
    elif segment.bias != NO_BIAS:
        bias = _table_bias(segment, numbers, h, positions, lowest, highest, k0, M, N, TRANSPOSED)
    if segment.bias == NO_BIAS or settings.has_cap:
        if TRANSPOSED:
            scores = tl.dot(k, q.T, input_precision=PRECISION)
        else:
            scores = tl.dot(q, k.T, input_precision=PRECISION)
    else:
        if TRANSPOSED:
            scores = tl.dot(k, q.T, bias, input_precision=PRECISION)
        else:
            scores = tl.dot(q, k.T, bias, input_precision=PRECISION)
    slope = 0
    if settings.has_cap:
        capped = tanh(scores / settings.cap)
        slope = 1.0 - capped * capped
        scores = capped * settings.cap
        if segment.bias != NO_BIAS:
            scores += bias
    hides = (k0 < 0) | (k0 + N > number(numbers.kv_len))
    if segment.kind == BAND:
        hides = hides | (k0 - last < number(numbers.lowest)) | (k0 + N - 1 - place > number(numbers.highest))
    elif segment.kind == CHUNKS:
        hides = hides | _chunks_hide(numbers, place, last, k0, N)
        if segment.causal:
            hides = hides | (k0 + N - 1 > place)
    else:
        hides = k0 >= 0  # a query does not see the key of the same token, or keys that an earlier round shows
    if hides:
        scores = _hide_by_pattern(
            scores, segment, numbers, b, h, heads, q_len, rows, exists, places, columns, keys, inside, TRANSPOSED
        )
    if segment.has_key_mask and MASK_KEYS:
        address = segment.key_mask + tl.cast(b, tl.int64) * number(numbers.kv_len) + keys
        seen = tl.load(address, mask=inside, other=0) != 0
        scores = tl.where(along_keys(seen, TRANSPOSED), scores, float("-inf"))
    if segment.has_mask:
        seen = _load_grid(segment.mask, b, h, rows, exists, keys, inside, TRANSPOSED) != 0
        scores = tl.where(seen, scores, float("-inf"))
    return scores, slope
