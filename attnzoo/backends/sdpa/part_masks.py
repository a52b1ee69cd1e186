"""Additive masks of the parts of an attention: pattern, masks and bias as one tensor that is added to the scores."""

from __future__ import annotations

from torch import Tensor

from attnzoo.backends.common.additive_masks import HashMasks, TokenMasks
from attnzoo.backends.common.blocks import Block, Masks, Part, additive
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import SortedChunks
from attnzoo.spec.segments import Attention


class PartMasks:
    """Factory of the additive masks of parts. The last mask of each segment is cached."""

    def __init__(self, attention: Attention) -> None:
        self._masks, self._attention = Masks(attention), attention
        self._last: dict[int, tuple[object, Tensor | None, Tensor | None]] = {}
        self._by_token: dict[tuple[int, bool], TokenMasks] = {}
        self._by_hash: dict[int, HashMasks] = {}

    def of(self, block: Block, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """Return the additive mask ``(batch, heads, n, m)``, or None if no mask is needed.

        The second result is bool ``(batch, heads, n)``, True for queries that see a key, or None if all see a key.
        """
        attention = self._attention
        mask, visible_rows = self._of_structure(block, part)
        keys = self._masks.of_keys(block, part)
        if keys is not None:
            pattern = self._masks.of_pattern(block, part)
            visible_rows = (keys if pattern is None else keys & pattern).any(-1)
            mask = additive(keys, mask, attention.query.dtype)
        shape = (attention.batch, attention.heads, block.rows, part.kv_stop - part.kv_start)
        mask = None if mask is None else mask.expand(shape)
        return mask, None if visible_rows is None else visible_rows.expand(shape[:3])

    def of_sorted(self, queries: Tensor, part: Part, step: int) -> tuple[Tensor, Tensor | None]:
        """Return the results of :meth:`of` for several blocks of sorted queries, without key mask and dense mask.

        ``queries`` ``(batch, heads, depth, n)`` are the query indices of all blocks. ``part`` is the part of the first
        block. The part of each next block begins ``step`` keys later. The mask is ``(batch, heads, depth, n, m)``.
        """
        pattern = self._attention.segments[part.segment].pattern
        if not isinstance(pattern, SortedChunks):
            raise TypeError(f"segment {part.segment}: got {pattern}; allowed: SortedChunks")
        return self._token_masks(pattern).of(queries, part.kv_start, part.kv_stop, step)

    def _token_masks(self, pattern: SortedChunks) -> TokenMasks:
        token = pattern.sorted_tensors()[1]  # hash rounds usually share this tensor
        known = (id(token), pattern.causal)
        if known not in self._by_token:
            self._by_token[known] = TokenMasks(token, pattern.causal, self._attention.query.dtype)
        return self._by_token[known]

    def _of_structure(self, block: Block, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """Return the results of :meth:`of` for pattern and bias only. Most blocks get the last result again."""
        segment, dtype = self._attention.segments[part.segment], self._attention.query.dtype
        pattern = segment.pattern
        if isinstance(pattern, SortedChunks) and segment.bias is None and block.queries is not None:
            return self._token_masks(pattern).of(block.queries, part.kv_start, part.kv_stop)
        if isinstance(pattern, HashedChunks) and block.queries is not None and part.keys is not None:
            if part.segment not in self._by_hash:
                self._by_hash[part.segment] = HashMasks(pattern, self._attention.q_len, segment.kv_len, dtype)
            return self._by_hash[part.segment].of(block.queries, part.keys)
        key, last = self._masks.key(block, part), self._last.get(part.segment)
        if key is not None and last is not None and last[0] == key:
            return last[1:]
        visible, bias = self._masks.of_pattern(block, part), self._masks.bias(block, part)
        mask = additive(visible, bias, dtype)
        visible_rows = None if visible is None else visible.any(-1)
        if key is not None:
            self._last[part.segment] = (key, mask, visible_rows)
        return mask, visible_rows
