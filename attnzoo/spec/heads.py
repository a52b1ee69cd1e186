"""Reshaping between projected states and heads: views where the memory layout allows."""

from __future__ import annotations

from torch import Tensor


def split_heads(states: Tensor, head_dim: int) -> Tensor:
    """``(batch, length, heads * head_dim)`` to ``(batch, heads, length, head_dim)``."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(output: Tensor) -> Tensor:
    """``(batch, heads, length, head_dim)`` to ``(batch, length, heads * head_dim)``."""
    return output.transpose(1, 2).flatten(2)


def expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """``(batch, kv_heads, n, d)`` to ``(batch, heads, n, d)``: neighbouring query heads share a key head.

    A view if there is one key head. The gradient of a key head is the sum over its query heads.
    """
    batch, kv_heads, length, dim = tensor.shape
    if kv_heads == heads:
        return tensor
    return tensor[:, :, None].expand(batch, kv_heads, heads // kv_heads, length, dim).reshape(batch, heads, length, dim)
