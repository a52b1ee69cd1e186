"""From projected states to heads and back: views, where memory allows."""

from __future__ import annotations

from torch import Tensor


def split_heads(states: Tensor, head_dim: int) -> Tensor:
    """``(batch, length, heads * head_dim)`` as ``(batch, heads, length, head_dim)``."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(output: Tensor) -> Tensor:
    """``(batch, heads, length, head_dim)`` as ``(batch, length, heads * head_dim)``."""
    return output.transpose(1, 2).flatten(2)
