"""The gradient of a dense bias: the gradient of every score, summed over samples and heads that share the bias."""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.backends.triton.kernels.gradients import tile_gradients
from attnzoo.backends.triton.kernels.spans import number


@triton.jit(do_not_specialize=["heads", "q_len", "batch", "bias_batch", "bias_heads", "which"])
def dense_bias_kernel(
    query, grad_out, softmax, delta, settings, grad, segment, numbers, heads, q_len, batch, bias_batch, bias_heads,
    which,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile of ``grad`` ``(bias_batch, bias_heads, q_len, kv_len)``, contiguous."""
    kv_len = number(numbers.kv_len)
    # A grid may have more than 65535 programs only in dimension 0.
    of_bias = tl.program_id(0)
    m0, k0 = tl.program_id(1) * BLOCK_M, tl.program_id(2) * BLOCK_N
    first_b, first_h = of_bias // bias_heads, of_bias % bias_heads
    rows = m0 + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(first_b, batch, bias_batch):
        for h in range(first_h, heads, bias_heads):
            acc += tile_gradients(
                query, grad_out, softmax, delta, settings, segment, numbers, b, h, heads, q_len, rows, rows, m0,
                m0 + BLOCK_M - 1, m0, tl.minimum(m0 + BLOCK_M, q_len) - 1, k0, which,
                DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    columns = k0 + tl.arange(0, BLOCK_N)
    address = grad + (of_bias.to(tl.int64) * q_len + rows[:, None]) * kv_len + columns[None, :]
    tl.store(address, acc.to(grad.dtype.element_ty), mask=(rows < q_len)[:, None] & (columns < kv_len)[None, :])
