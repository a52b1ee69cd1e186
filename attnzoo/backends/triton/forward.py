"""The launches of the forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from attnzoo.backends.triton.kernels.arguments import Softmax
from attnzoo.backends.triton.kernels.forward import forward_kernel
from attnzoo.backends.triton.plan import Inputs, Plan, keys_of, rows, settings
from attnzoo.backends.triton.tile_sizes import Tile, tile


def constants(plan: Plan) -> dict[str, Any]:
    """Return the compile-time arguments that all kernels have."""
    return dict(
        DIM=plan.head_dim,
        VALUE_DIM=plan.value_dim,
        BLOCK_D=block_dim(plan.head_dim),
        BLOCK_V=block_dim(plan.value_dim),
        PRECISION=precision(plan.dtype),
    )


def block_dim(dim: int) -> int:
    """Return the width of a tile for vectors of ``dim`` components: a power of two, at least 16 for matrix products."""
    return max(16, 1 << (dim - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """Return the precision of products: TF32 for float32 only if the user allows TF32 in PyTorch."""
    matmul = torch.backends.cuda.matmul
    # PyTorch's older setting raises an error if the user has changed the newer one.
    allows_tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and allows_tf32 else "ieee"


def tile_of(kernel: str, plan: Plan) -> Tile:
    """Return the sizes of the tiles of a kernel."""
    dim = block_dim(max(plan.head_dim, plan.value_dim))
    needs_more = plan.dropout > 0.0 or plan.softcap is not None or any(form.needs_more for form in plan.forms)
    return tile(kernel, dim, plan.dtype, plan.device, 1 << (plan.q_len - 1).bit_length(), needs_more)


def compile_options(sizes: Tile) -> dict[str, int]:
    """Return ``sizes`` as arguments of a kernel launch."""
    return dict(BLOCK_M=sizes.queries, BLOCK_N=sizes.keys, num_warps=sizes.warps, num_stages=sizes.stages)


def new_rows(plan: Plan, dim: int, dtype: torch.dtype) -> Tensor:
    """Return a new tensor ``(batch, heads, q_len, dim)`` in the layout ``(batch, length, heads, dim)`` of models."""
    return in_rows((plan.batch, plan.heads, plan.q_len, dim), dtype, plan.device)


def in_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new tensor ``(batch, heads, length, dim)`` in the layout ``(batch, length, heads, dim)`` of models.

    So a projection merges the heads without a copy, in the forward or in the backward.
    """
    batch, heads, length, dim = shape
    return torch.empty((batch, length, heads, dim), dtype=dtype, device=device).transpose(1, 2)


def new_seed(plan: Plan) -> Tensor | None:
    """Return a seed for dropout from PyTorch's generator of the device, or None without dropout."""
    return torch.randint(1 << 62, (1,), device=plan.device) if plan.dropout > 0.0 else None


def run_forward(plan: Plan, inputs: Inputs, seed: Tensor | None) -> tuple[Tensor, Softmax]:
    """Return the output ``(batch, heads, q_len, value_dim)`` and the softmax of each query.

    ``inputs`` are the results of :func:`~attnzoo.backends.triton.plan.tables`.
    """
    of_rows = torch.empty((2, plan.batch, plan.heads, plan.q_len), dtype=torch.float32, device=plan.device)
    softmax = Softmax(of_rows[0], of_rows[1])
    sizes = tile_of("forward", plan)
    grid = (triton.cdiv(plan.q_len, sizes.queries) * plan.batch * plan.heads,)
    earlier, first_segment = None, 0
    for number, indices in enumerate(plan.passes):
        is_last = number == len(plan.passes) - 1
        out = new_rows(plan, plan.value_dim, plan.dtype if is_last else torch.float32)
        forward_kernel[grid](
            query=rows(inputs.query),
            out=rows(out),
            earlier=rows(out if earlier is None else earlier),
            softmax=softmax,
            query_mask=plan.query_mask,
            empty=rows(inputs.query if inputs.empty is None else inputs.empty),
            settings=settings(plan, seed),
            segments=tuple(keys_of(plan, inputs, index) for index in indices),
            numbers=tuple(map(plan.numbers, indices)),
            heads=plan.heads,
            q_len=plan.q_len,
            first_segment=first_segment,
            HAS_QUERY_MASK=plan.query_mask is not None,
            HAS_EMPTY=inputs.empty is not None,
            IS_FIRST=number == 0,
            IS_LAST=is_last,
            **constants(plan),
            **compile_options(sizes),
        )
        earlier, first_segment = out, first_segment + len(indices)
    return out, softmax
