"""Functions on tiles: loads, broadcasts, exponentials and dropout."""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.tile_sizes import is_interpreted

# Triton decides at its import whether it interprets kernels. Interpreted kernels run no PTX instructions.
PTX = tl.constexpr(not is_interpreted())
LOG2_E = tl.constexpr(1.4426950408889634)
# Where the running maximum of a row starts: no score is lower. It is finite, because hidden scores are -inf, and
# (-inf) - (-inf) is NaN.
FLOOR = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def along_queries(vector, TRANSPOSED: tl.constexpr):
    """A vector with one entry per query, as ``[M, 1]``, or as ``[1, M]`` for tiles of keys by queries."""
    if TRANSPOSED:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def along_keys(vector, TRANSPOSED: tl.constexpr):
    """A vector with one entry per key, as ``[1, N]``, or as ``[N, 1]`` for tiles of keys by queries."""
    if TRANSPOSED:
        return vector[:, None]
    else:
        return vector[None, :]


@triton.jit
def of_head(tensor, b, h):
    """The address of row 0 of a head."""
    return tensor.data + tl.cast(b, tl.int64) * tensor.batch + tl.cast(h, tl.int64) * tensor.head


@triton.jit
def row_offsets(tensor, rows, BLOCK_D: tl.constexpr):
    """Offsets ``[n, BLOCK_D]`` of rows in a head."""
    return rows.to(tl.int64)[:, None] * tensor.row + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def row_mask(exists, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which entries of a tile of rows exist. ``BLOCK_D`` must be a power of two, but ``DIM`` need not be."""
    mask = exists[:, None]
    if DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < DIM)[None, :]
    return mask


@triton.jit
def load_rows(tensor, b, h, rows, exists, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``[n, BLOCK_D]`` of a head, 0 where they do not exist."""
    mask = row_mask(exists, DIM, BLOCK_D)
    return tl.load(of_head(tensor, b, h) + row_offsets(tensor, rows, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def load_tile(tensor, b, h, first, inside, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``COUNT`` neighbouring rows of a head from row ``first`` on, 0 where not ``inside``.

    Only the address of the first row changes from tile to tile. The offsets in a tile are small and stay in registers.
    """
    address = of_head(tensor, b, h) + tl.cast(first, tl.int64) * tensor.row
    offsets = tl.arange(0, COUNT)[:, None] * tensor.row + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(address + offsets, mask=row_mask(inside, DIM, BLOCK_D), other=0.0)


@triton.jit
def load_tile_of(
    tensor, b, h, first, rows, exists, ARE_SORTED: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows ``rows`` of a head, which are neighbours from ``first`` on unless a hash round has sorted them."""
    if ARE_SORTED:
        return load_rows(tensor, b, h, rows, exists, DIM, BLOCK_D)
    else:
        return load_tile(tensor, b, h, first, exists, COUNT, DIM, BLOCK_D)


@triton.jit
def store_rows(tensor, b, h, rows, exists, values, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows ``[n, BLOCK_D]`` of a head, where they exist."""
    address = of_head(tensor, b, h) + row_offsets(tensor, rows, BLOCK_D)
    tl.store(address, values.to(tensor.data.dtype.element_ty), mask=row_mask(exists, DIM, BLOCK_D))


@triton.jit
def power_of_two(x):
    """2 ** x. The instruction with ``ftz`` needs no further instructions for results below 2 ** -126."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def tanh(x):
    """The hyperbolic tangent. The formula with exponentials would lose the digits of a small ``x``.

    The polynomial is a least-squares fit, weighted until the largest relative error for ``|x| <= 0.625`` is 4e-9.
    """
    z = x * x
    p = 0.02065045 - 0.0057169 * z
    p = -0.33333284 + z * (0.13331491 + z * (-0.05374345 + z * p))
    exponential = power_of_two(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - exponential) / (1.0 + exponential)
    return tl.where(z <= 0.390625, x + x * z * p, tl.where(x < 0.0, -large, large))


@triton.jit
def look_up(table, index):
    """``table[index]`` for a tile of indices, float32.

    The load is a PTX instruction. For a load of Triton, the tile would move through shared memory to another layout.
    """
    if PTX:
        address = table.to(tl.int64) + 4 * index.to(tl.int64)
        return tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [address], tl.float32, True, 1)
    else:
        return tl.load(table + index)


@triton.jit
def kept(settings, segment, head, rows, keys, TRANSPOSED: tl.constexpr):
    """Which weights of a tile dropout keeps: a function of seed, segment, head, query and key alone.

    So the backward computes the same decisions again, in tiles of other shapes. Philox (Salmon et al. 2011) makes the
    numbers.
    """
    row = along_queries(rows.to(tl.int32), TRANSPOSED)
    key = along_keys(keys.to(tl.int32), TRANSPOSED)
    row, key = row + 0 * key, key + 0 * row
    number, _, _, _ = tl.philox(tl.load(settings.seed), key, row, 0 * key + head, 0 * key + segment)
    return tl.uint_to_uniform_float(number) >= settings.dropout
