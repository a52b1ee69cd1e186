"""Read and write rows (the last dimension) of tensors by index, for queries and keys that a pattern reorders.

Copying a row as one piece of memory is several times faster than ``gather`` or ``scatter``, which need an index per
element. This module uses ``gather`` and ``scatter`` only for tensors whose rows are not contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Return the rows at ``index`` ``(batch, heads, m)`` of ``(batch, heads, n)`` or ``(batch, heads, n, dim)``."""
    flat = _as_rows(tensor, index)
    if flat is None:
        return tensor.gather(2, _expanded(tensor, index))
    return flat[0].index_select(0, flat[1]).view(*index.shape, *tensor.shape[3:])


def put_(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write ``values`` to the rows at ``index``, shapes as in :func:`take`. A head must not contain an index twice."""
    flat, values = _as_rows(tensor, index), values.to(tensor.dtype)
    if flat is None:
        tensor.scatter_(2, _expanded(tensor, index), values)
    else:
        flat[0].index_copy_(0, flat[1], values.reshape(-1, flat[0].shape[1]))


def add_(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Add ``values`` to the rows at ``index``, shapes as in :func:`take`. A head may contain an index several times."""
    flat, values = _as_rows(tensor, index), values.to(tensor.dtype)
    if flat is None:
        tensor.scatter_add_(2, _expanded(tensor, index), values)
    else:
        flat[0].index_add_(0, flat[1], values.reshape(-1, flat[0].shape[1]))


def _expanded(tensor: Tensor, index: Tensor) -> Tensor:
    return index if tensor.ndim == 3 else index[..., None].expand(-1, -1, -1, tensor.shape[3])


def _as_rows(tensor: Tensor, index: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a view ``(all rows, dim)`` and ``index`` as row indices of this view. None if rows are not contiguous."""
    dim = tensor.shape[3] if tensor.ndim == 4 else 1
    # The stride of a dimension of size 1 is arbitrary.
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if dim > 1 and (strides[3] != 1 or any(stride % dim for stride in strides[:3])):
        return None
    batch, heads, step = (stride // dim for stride in strides[:3])
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, (batch, heads, step), strict=False))
    rows = tensor.as_strided((last + 1, dim), (dim, 1))
    samples, all_heads = (torch.arange(size, device=index.device) for size in index.shape[:2])
    offsets = samples[:, None, None] * batch + all_heads[:, None] * heads
    return rows, (index * step + offsets).flatten()
