"""The gradient of a bias table that is read at ``key index - position of the query``, without atomics.

For consecutive keys, a query at position ``p`` reads consecutive table entries. Queries with equal positions read equal
entries, so each column of their scores reads one entry. A program computes some consecutive entries: it goes through
many tiles of queries and the distinct positions in each tile, and adds up score gradients in registers. In LongT5, 16
neighbouring queries have equal positions. Other positions are correct too, but a tile needs one step per distinct
position. The query kernel computes the gradients of the first and the last entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.kernels.distance_table import at_ends
from attnzoo.backends.triton.kernels.gradients import tile_gradients
from attnzoo.backends.triton.kernels.spans import number


@triton.jit(do_not_specialize=["heads", "q_len", "batch", "which", "chunks"])
def position_kernel(
    query, grad_out, softmax, delta, settings, total, segment, numbers, heads, q_len, batch, which, chunks,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the sums ``total`` ``(chunks, heads, size)``, except the first and the last entry."""
    run, chunk, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    size, zero, kv_len = number(numbers.size), number(numbers.zero), number(numbers.kv_len)
    entry = 1 + run * BLOCK_N
    i = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks = tl.cdiv(q_len, BLOCK_M)
    for block in range(chunk, blocks * batch, chunks):
        b, m0 = block // blocks, block % blocks * BLOCK_M
        rows = m0 + i
        exists = rows < q_len
        # Rows that do not exist have the position of the first row, so they add no distinct position.
        index = tl.where(exists, rows, m0)
        positions = tl.load(segment.positions + tl.cast(b, tl.int64) * q_len + index).to(tl.int32)
        highest = tl.max(positions, 0)
        lowest = tl.min(positions, 0)
        position = lowest
        while position <= highest:
            k0 = entry + position - zero
            if (k0 + BLOCK_N > 0) & (k0 < kv_len):
                ds = tile_gradients(
                    query, grad_out, softmax, delta, settings, segment, numbers, b, h, heads, q_len, rows, positions,
                    lowest, highest, m0, tl.minimum(m0 + BLOCK_M, q_len) - 1, k0, which,
                    DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, PRECISION,
                )  # fmt: skip
                acc += tl.where((positions == position)[:, None], ds, 0.0)
            position = tl.min(tl.where(positions > position, positions, highest + 1), 0)
    entries = entry + tl.arange(0, BLOCK_N)
    at = tl.cast(chunk * heads + h, tl.int64) * size
    tl.store(total + at + entries, tl.sum(acc, 0), mask=entries < size - 1)


@triton.jit(do_not_specialize=["heads", "chunks", "size"])
def entries_kernel(total, ends, grad, heads, chunks, size, BLOCK_R: tl.constexpr):
    """Write the gradient ``grad`` ``(heads, size)`` of a table: the sum of ``total`` over chunks, and ``ends``."""
    h = tl.program_id(1)
    entry = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (entry > 0) & (entry < size - 1)
    acc = at_ends(ends, h, entry, size)
    for chunk in range(0, chunks):
        acc += tl.load(total + tl.cast(chunk * heads + h, tl.int64) * size + entry, mask=inside, other=0.0)
    tl.store(grad + h * size + entry, acc.to(grad.dtype.element_ty), mask=entry < size)
