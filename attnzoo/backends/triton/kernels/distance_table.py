"""The gradient of a bias table that is read by distance, without atomics.

The offset of a tile is the distance from its first query to its first key. Tiles with equal offsets read the same table
entries. A program adds up the score gradients of many tiles with one offset in registers. A second kernel then sums the
diagonals of these sums. The order of the additions is fixed, so the result is the same each time. The query kernel
computes the gradients of the first and the last table entry, because these may belong to any number of distances.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.kernels.gradients import tile_gradients
from attnzoo.backends.triton.kernels.spans import number


@triton.jit(do_not_specialize=["heads", "q_len", "batch", "which", "lowest", "chunks"])
def distance_kernel(
    query, grad_out, softmax, delta, settings, total, segment, numbers, heads, q_len, batch, which, lowest, chunks,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the sums ``total`` ``(chunks, heads, offsets, BLOCK_M, BLOCK_N)``.

    The offset ``n`` of a tile is the distance ``lowest + n * BLOCK_N`` of its first key from its first query.
    """
    offset, chunk, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks = tl.cdiv(q_len, BLOCK_M)
    for block in range(chunk, blocks * batch, chunks):
        m0 = block % blocks * BLOCK_M
        k0 = m0 + lowest + offset * BLOCK_N
        if (k0 + BLOCK_N > 0) & (k0 < number(numbers.kv_len)):
            acc += tile_gradients(
                query, grad_out, softmax, delta, settings, segment, numbers, block // blocks, h, heads, q_len, m0 + i,
                m0 + i, m0, m0 + BLOCK_M - 1, m0, tl.minimum(m0 + BLOCK_M, q_len) - 1, k0, which,
                DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    at = tl.cast((chunk * heads + h) * tl.num_programs(0) + offset, tl.int64) * (BLOCK_M * BLOCK_N)
    tl.store(total + at + i[:, None] * BLOCK_N + j[None, :], acc)


@triton.jit(do_not_specialize=["heads", "chunks", "offsets", "size", "first", "last"])
def diagonals_kernel(
    total, ends, grad, heads, chunks, offsets, size, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write the gradient ``grad`` ``(heads, size)`` of a table.

    The entries ``first`` to ``last`` are sums of diagonals of ``total``. The entry ``first`` belongs to the distance
    ``lowest`` of :func:`distance_kernel`. ``ends`` ``(heads, 2)`` is added to the first and the last entry.
    """
    h = tl.program_id(1)
    entry = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_M)
    x = i[:, None] + (entry - first)[None, :]
    inside = ((entry >= first) & (entry <= last))[None, :] & (x >= 0)
    place = x // BLOCK_N * (BLOCK_M * BLOCK_N) + i[:, None] * BLOCK_N + x % BLOCK_N
    acc = at_ends(ends, h, entry, size)
    for chunk in range(0, chunks):
        tiles = total + tl.cast(chunk * heads + h, tl.int64) * offsets * (BLOCK_M * BLOCK_N)
        acc += tl.sum(tl.load(tiles + place, mask=inside, other=0.0), 0)
    tl.store(grad + h * size + entry, acc.to(grad.dtype.element_ty), mask=entry < size)


@triton.jit
def at_ends(ends, h, entry, size):
    """The gradients that the query kernel has summed, at the first and the last entry of the table of a head."""
    first, last = tl.load(ends + 2 * h), tl.load(ends + 2 * h + 1)
    return tl.where(entry == 0, first, 0.0) + tl.where(entry == size - 1, last, 0.0)
