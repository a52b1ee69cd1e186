"""Masks of sorted keys as additive terms, made from token numbers: every block has its own, so it must be quick.

Comparisons of floating-point numbers that write floating-point numbers run at full width; those that write bools, and
filling by them, run at a tenth of it. Token numbers are whole, so that nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Far below any score, and finite: the products of it with 0 and 1 are what is wanted.
_HIDDEN = -1e30
_EXACT_IN_FLOAT32 = 1 << 24


class TokenTerms:
    """Additive masks of :class:`~attnzoo.spec.patterns.SortedChunks`; each is valid until the next one is made.

    Args:
        token: ``(batch, heads, kv_len)`` long, the token of each key, -1 for hidden ones.
        causal: queries see keys of earlier tokens only; otherwise of all but their own.
        dtype: of the terms.
    """

    def __init__(self, token: Tensor, causal: bool, dtype: torch.dtype) -> None:
        self._causal, self._dtype = causal, dtype
        wide = torch.float32 if int(token.max()) < _EXACT_IN_FLOAT32 else torch.float64
        hidden = token < 0
        self._any_hidden = bool(hidden.any())
        self._first = token.to(wide).masked_fill_(hidden, float("inf"))
        self._last = token.to(wide).masked_fill_(hidden, float("-inf"))
        self._hidden = hidden.to(wide)
        self._buffers: dict[tuple[int, ...], Tensor] = {}

    def of(self, queries: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """The term ``(batch, heads, n, stop - start)``, and which rows see a key ``(batch, heads, n)``; None: all do.

        Args:
            queries: ``(batch, heads, n)`` long.
            start, stop: the range of keys.
        """
        keys = slice(start, stop)
        first, query = self._first[:, :, keys], queries.to(self._first.dtype)
        shape = (*queries.shape, stop - start)
        if shape not in self._buffers:
            self._buffers[shape] = first.new_empty(shape)
        term = self._buffers[shape]
        lowest = first.amin(-1, keepdim=True)
        if self._causal:
            torch.ge(first[:, :, None], query[..., None], out=term)
            live = lowest < query
        else:
            torch.eq(first[:, :, None], query[..., None], out=term)
            if self._any_hidden:
                term.add_(self._hidden[:, :, None, keys])
            highest = self._last[:, :, keys].amax(-1, keepdim=True)
            live = (lowest <= highest) & ((lowest != query) | (highest != query))
        return term.mul_(_HIDDEN).to(self._dtype), None if bool(live.all()) else live
