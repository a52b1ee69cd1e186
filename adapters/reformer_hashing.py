"""Hash the queries of LSH attention, with the buckets of the original code and less memory traffic.

A query is rotated at random. With ``n`` buckets, the bucket is the index of the largest of the ``n`` numbers
``[rotated, -rotated]`` (Andoni et al. 2015, arXiv:1509.02897). The original code stores this concatenation, which is
many times as large as the queries. This module does not.

On the CPU, slices of queries are rotated. All slices use the same rotations. The matrix product of a slice has exactly
the same values as these rows in the product of all queries, unless a slice is very short. Other devices may select
another kernel for a slice, so they rotate all queries at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError

# Tokens per slice. The rotations of 384 queries fit in the CPU's cache. Fewer tokens would need too many calls.
HASHED_AT_ONCE = 384


def hash_queries(hasher: Any, query: Tensor, hashes: int, attention_mask: Tensor | None) -> Tensor:
    """Return the result of ``hasher._hash_vectors``, the original code. On the CPU, it is computed in slices.

    The random state afterwards also equals that of the original code.

    Args:
        hasher: an LSH attention module whose ``num_buckets`` is set.
        query: ``(batch, heads, length, head_dim)``.
        hashes: the number of rounds.
        attention_mask: ``(batch or 1, length)``, 0 for padding. None means no padding.

    Returns:
        Buckets ``(batch, heads, hashes * length)`` int64. Rounds have different buckets: each round has as many buckets
        as the module, and one more for padding if there is padding.
    """
    query = query.detach()
    batch, heads, length, dim = query.shape
    factors = [hasher.num_buckets] if isinstance(hasher.num_buckets, int) else list(hasher.num_buckets)
    if any(factor % 2 for factor in factors):
        raise InvalidArgumentError(
            "config.num_buckets", hasher.num_buckets, "an even number, or a list of even numbers"
        )
    if hasher.hash_seed is not None:
        torch.manual_seed(hasher.hash_seed)
    shape = (heads, dim, hashes, sum(factors) // 2)
    rotations = torch.randn(shape, dtype=query.dtype, device=query.device)
    buckets = torch.empty((batch, heads, hashes, length), dtype=torch.long, device=query.device)
    search = _FirstLargest() if query.device.type == "cpu" else first_largest
    for rows, out in zip(_slices(query, 2), _slices(buckets, 3), strict=True):
        rotated, product, total = torch.einsum("bmtd,mdhr->bmhtr", rows, rotations), 1, torch.zeros_like(out)
        for factor, part in zip(factors, rotated.split([factor // 2 for factor in factors], dim=-1), strict=True):
            total += product * search(part)
            product *= factor
        out.copy_(total)
    number = torch.Size(factors).numel()
    if attention_mask is not None and bool((attention_mask == 0).any()):
        buckets.masked_fill_(~attention_mask.bool()[:, None, None], number)
        number += 1
    return (buckets + number * torch.arange(hashes, device=query.device)[:, None]).flatten(2)


def _slices(tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
    count = tensor.shape[dim] // HASHED_AT_ONCE if tensor.device.type == "cpu" else 1
    return tensor.tensor_split(max(1, count), dim=dim)


def first_largest(x: Tensor) -> Tensor:
    """Return ``torch.cat([x, -x], -1).argmax(-1)``. ``max`` and ``min`` also return the first of equal numbers."""
    highest, lowest = x.max(-1), x.min(-1)
    return torch.where(highest.values < -lowest.values, lowest.indices + x.shape[-1], highest.indices)


class _FirstLargest:
    """:func:`first_largest` on the CPU, where ``argmax``, ``max`` and ``min`` compare one number at a time.

    The reductions below use vector instructions, and take half of the time.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        highest, lowest = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
        is_negative = highest < -lowest
        if self._buffer is None or self._buffer.shape != x.shape:
            self._buffer = torch.empty_like(x, dtype=torch.float32)
        # Comparing numbers is much faster if the result is a floating-point tensor and not a bool tensor.
        equal = torch.eq(x, torch.where(is_negative, lowest, highest), out=self._buffer)
        count = x.shape[-1]
        from_last = torch.arange(count, 0, -1, dtype=torch.float32, device=x.device)
        first = count - equal.mul_(from_last).amax(-1).long()
        return first + count * is_negative[..., 0]
