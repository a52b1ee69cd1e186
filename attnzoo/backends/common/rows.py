"""Rows of tensors by number, moved whole: for queries that stand in an order of their own.

A row found by one number moves as one piece of memory, which is several times faster than gathering or scattering
with an index per element.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows ``(batch, heads, m)`` or ``(batch, heads, m, dim)`` of a tensor that has ``n`` in place of ``m``.

    Args:
        tensor: ``(batch, heads, n)`` or ``(batch, heads, n, dim)``.
        index: ``(batch, heads, m)`` long.
    """
    found = _numbered(tensor, index)
    if found is None:
        return tensor.gather(2, _expanded(tensor, index))
    rows, numbers = found
    return rows.index_select(0, numbers).view(*index.shape, *tensor.shape[3:])


def put_(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write rows; no index may occur twice."""
    found, values = _numbered(tensor, index), values.to(tensor.dtype)
    if found is None:
        tensor.scatter_(2, _expanded(tensor, index), values)
    else:
        found[0].index_copy_(0, found[1], values.reshape(-1, found[0].shape[1]))


def add_(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Add to rows."""
    found, values = _numbered(tensor, index), values.to(tensor.dtype)
    if found is None:
        tensor.scatter_add_(2, _expanded(tensor, index), values)
    else:
        found[0].index_add_(0, found[1], values.reshape(-1, found[0].shape[1]))


def _expanded(tensor: Tensor, index: Tensor) -> Tensor:
    return index if tensor.ndim == 3 else index[..., None].expand(-1, -1, -1, tensor.shape[3])


def _numbered(tensor: Tensor, index: Tensor) -> tuple[Tensor, Tensor] | None:
    """The tensor's memory as rows ``(rows, dim)``, and which of them; None if its layout is not one of whole rows."""
    dim = tensor.shape[3] if tensor.ndim == 4 else 1
    # A stride along a dimension of one element means nothing.
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if dim > 1 and (strides[3] != 1 or any(stride % dim for stride in strides[:3])):
        return None
    batch, heads, step = (stride // dim for stride in strides[:3])
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, (batch, heads, step), strict=False))
    rows = tensor.as_strided((last + 1, dim), (dim, 1))
    device = index.device
    samples = torch.arange(index.shape[0], device=device)[:, None, None] * batch
    offsets = samples + torch.arange(index.shape[1], device=device)[:, None] * heads
    return rows, (index * step + offsets).flatten()
