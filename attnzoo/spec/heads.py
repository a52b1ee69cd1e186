"""Functions that split, merge and expand heads. Their results are views if the memory layout allows views."""

from __future__ import annotations

from torch import Tensor


def split_heads(states: Tensor, head_dim: int) -> Tensor:
    """Reshape ``(batch, length, heads * head_dim)`` to ``(batch, heads, length, head_dim)``."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(output: Tensor) -> Tensor:
    """Reshape ``(batch, heads, length, head_dim)`` to ``(batch, length, heads * head_dim)``."""
    return output.transpose(1, 2).flatten(2)


def expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """Expand ``(batch, kv_heads, n, d)`` to ``(batch, heads, n, d)``. Neighbouring query heads share a key head.

    The result is a view if ``kv_heads`` is 1. The gradient of a key head is the sum over the query heads that share it.
    """
    batch, kv_heads, length, dim = tensor.shape
    if kv_heads == heads:
        return tensor
    if kv_heads == 1:
        return tensor.expand(batch, heads, length, dim)
    return tensor[:, :, None].expand(batch, kv_heads, heads // kv_heads, length, dim).reshape(batch, heads, length, dim)
