"""Additive biases are values that are added to the scores before the softmax. A bias may be trained.

A function ``score_mod(score, b, h, q, kv)``, as in FlexAttention, defines a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.patterns import Tile
from attnzoo.spec.transforms import readable

_ROWS_AT_ONCE = 128
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
BiasAt = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


@dataclass(frozen=True, eq=False)
class Bias:
    """Base class of biases. Capabilities and requests identify a bias by the attribute ``kind``.

    In all methods, ``q_len`` and ``kv_len`` are the lengths of the whole query and key sequences, in tokens.
    """

    kind: ClassVar[str] = "none"
    values: Tensor

    @property
    def per_sample(self) -> bool:
        """Whether the bias differs between the samples of a batch."""
        return False

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        """Raise :class:`InvalidArgumentError` unless the values fit an attention of these sizes."""
        if not isinstance(self.values, Tensor) or not self.values.is_floating_point():
            got = f"a tensor of {self.values.dtype}" if isinstance(self.values, Tensor) else self.values
            raise InvalidArgumentError("bias values", got, "a floating-point tensor (to hide keys, use mask=)")
        self._check_sizes(batch, heads, q_len, kv_len)

    def _check_sizes(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        """Raise :class:`InvalidArgumentError` unless shapes and positions fit. :meth:`check` has checked the dtype."""

    def score_mod(self, q_len: int, kv_len: int) -> ScoreMod:
        """Return a function ``f(score, b, h, q, kv)`` that adds the bias of query ``q`` and key ``kv`` to ``score``."""
        bias_at = self.gather(q_len, kv_len)
        return lambda score, b, h, q, kv: score + bias_at(b, h, q, kv)

    def gather(self, q_len: int, kv_len: int) -> BiasAt:
        """Return a function ``f(b, h, q, kv)`` that maps broadcastable index tensors to bias values."""
        raise NotImplementedError

    def block(self, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> Tensor:
        """Return the bias ``(batch or 1, heads or 1, n, m)`` of some queries and keys.

        ``q`` ``(n,)`` or ``(batch, heads, n)`` are query indices. ``kv`` ``(m,)`` or ``(batch, m)`` are key indices,
        each at most once per sample.
        """
        raise NotImplementedError

    def of_query(self, query: int, q_len: int, kv_len: int) -> Tensor | None:
        """Return the bias ``(batch or 1, heads or 1, 1, kv_len)`` of one query, or None if :meth:`block` must be used.

        A decoding step needs the bias of only one query, which takes fewer operations than :meth:`block`.
        """
        return None

    def block_key(self, tile: Tile) -> tuple[int, ...] | None:
        """Return a cache key, or None if no bias can be reused. Tiles with equal cache keys have equal biases."""
        return None

    def add_gradient_(self, grad: Tensor, grad_scores: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> None:
        """Add the contribution of one block of scores to ``grad``, which is the gradient of :attr:`values`.

        ``grad`` is changed in place. ``grad_scores`` ``(batch, heads, n, m)`` is the gradient of the scores in the
        block. ``q`` ``(n,)`` and ``kv`` ``(m,)`` are the query indices and the key indices of the block.
        """
        raise NotImplementedError


def _are_consecutive(index: Tensor) -> bool:
    return bool((index[1:] - index[:-1] == 1).all())


def _sums_of_diagonals(scores: Tensor) -> Tensor:
    """Return the sums of the diagonals of ``(heads, n, m)`` as ``(heads, n + m - 1)``, from the lower left corner on.

    The function pads rows to ``n + m`` entries, and then reads the same memory as rows of ``n + m - 1`` entries. Each
    row moves by one column more than the row before, so a diagonal becomes a column. Sums of columns are much faster
    than a scatter.
    """
    heads, n, m = scores.shape
    wide = torch.nn.functional.pad(scores.flip(1), (0, n)).flatten(1)
    return wide[:, : n * (n + m - 1)].view(heads, n, n + m - 1).sum(1)


@dataclass(frozen=True, eq=False)
class RelativeBias(Bias):
    """A bias that depends only on the head and on ``key position - query position`` (T5, Raffel et al. 2020).

    Attributes:
        values: ``(heads or 1, R)``, one value for each of ``R`` consecutive distances. A key ``d`` tokens after the
            query gets ``values[h, zero + d]``. Distances below this range get the first value, and distances above
            this range get the last value.
            To train ``weights`` ``(buckets, heads)``, pass ``weights[bucket].T``, where ``bucket`` ``(R,)`` is the
            bucket index of each distance. ``weights`` then gets gradients.
        zero: the index of distance 0 in ``values``.
        offset: the position of query 0 in the key sequence. None aligns the last query with the last key.
        positions: ``(batch, q_len)`` int64, the position of each query among the keys. None means ``offset + q`` for
            query ``q``. LongT5 passes positions, because each aggregate key of LongT5 represents a block of tokens.

    Example:
        >>> import torch, attnzoo
        >>> bias = attnzoo.RelativeBias(torch.tensor([[-1.0, 0.0, 1.0]]), zero=1)
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> attnzoo.attention(q, k, v, bias=bias).shape
        torch.Size([1, 2, 5, 8])
    """

    zero: int
    offset: int | None = None
    positions: Tensor | None = None
    kind: ClassVar[str] = "relative"

    @property
    def per_sample(self) -> bool:
        return self.positions is not None

    def _check_sizes(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        fits = self.values.ndim == 2 and self.values.shape[0] in (1, heads)
        if not fits or not _is_integer(self.zero) or not 0 <= self.zero < self.values.shape[1]:
            got = f"`values` of shape {tuple(self.values.shape)}, zero={self.zero!r}"
            raise InvalidArgumentError(
                "bias", got, f"`values` of shape (1 or {heads}, R), and an integer `zero` with 0 <= zero < R"
            )
        if self.offset is not None and not _is_integer(self.offset):
            raise InvalidArgumentError("bias offset", repr(self.offset), "an integer, or None")
        if self.positions is None:
            return
        if not isinstance(self.positions, Tensor):
            raise InvalidArgumentError("bias positions", repr(self.positions), f"None, or shape ({batch}, {q_len})")
        if tuple(self.positions.shape) != (batch, q_len):
            got = f"shape {tuple(self.positions.shape)}"
            raise InvalidArgumentError("bias positions", got, f"shape ({batch}, {q_len})")
        if self.positions.dtype != torch.long or self.positions.device != self.values.device:
            got = f"{self.positions.dtype} on {self.positions.device}"
            raise InvalidArgumentError("bias positions", got, f"torch.int64 on {self.values.device}, like `values`")

    def _shift(self, q_len: int, kv_len: int) -> int:
        return kv_len - q_len if self.offset is None else self.offset

    def gather(self, q_len: int, kv_len: int) -> BiasAt:
        per_head = self.values.shape[0] > 1

        def bias_at(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return self.values[h if per_head else torch.zeros_like(h), self._index(b, q, kv, q_len, kv_len)]

        return bias_at

    def block(self, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> Tensor:
        positions = self._positions(q, q_len, kv_len)
        is_per_row = self.positions is None or q.ndim > 1 or kv.ndim > 1 or self._is_differentiated
        if is_per_row or q.device.type != "cpu" or not readable(positions):
            return self._rows(positions, kv)
        # Queries at equal positions have equal rows, and a copy of a row is much faster than a gather.
        distinct, row = positions[:, 0].unique(return_inverse=True)
        rows = self._rows(distinct[None, None], kv)[0].index_select(1, row.flatten())  # (heads or 1, batch * n, m)
        return rows.unflatten(1, row.shape).movedim(0, 1)

    def of_query(self, query: int, q_len: int, kv_len: int) -> Tensor | None:
        if self.positions is not None:
            return None
        device = self.values.device
        if self._is_differentiated:  # a gather would sum the gradients of equal distances one after another
            indices = torch.arange(query, query + 1, device=device), torch.arange(kv_len, device=device)
            return self.block(*indices, q_len, kv_len)
        first = self.zero - query - self._shift(q_len, kv_len)  # the index of key 0, before the limits of the table
        index = torch.arange(first, first + kv_len, device=device).clamp_(0, self.values.shape[1] - 1)
        return self.values.index_select(1, index)[None, :, None]

    def at_positions(self, positions: Tensor, kv_len: int) -> Tensor:
        """Return the bias ``(heads or 1, n, kv_len)`` of all keys for queries at ``positions`` ``(n,)``."""
        return self._rows(positions[None, None], torch.arange(kv_len, device=positions.device))[0]

    @property
    def _is_differentiated(self) -> bool:
        return torch.is_grad_enabled() and self.values.requires_grad

    def _positions(self, q: Tensor, q_len: int, kv_len: int) -> Tensor:
        """Return the positions ``(batch or 1, heads or 1, n)`` of queries ``(n,)`` or ``(batch, heads, n)``."""
        if self.positions is None:
            return (q if q.ndim > 1 else q[None, None]) + self._shift(q_len, kv_len)
        samples = torch.arange(len(self.positions), device=q.device)[:, None, None]
        return self.positions[samples, q]

    def _rows(self, positions: Tensor, kv: Tensor) -> Tensor:
        """Return the bias ``(batch or 1, heads or 1, n, m)`` of keys for queries at ``(batch or 1, heads or 1, n)``.

        The gradient of one value may sum over all scores, and is often near 0. Autograd sums the gradients of a gather
        one after another, with a rounding error that grows with their number. So this method reads each entry at most
        once per row: it appends ``m`` copies of the first and of the last value to the table. Autograd then sums rows
        and copies pairwise. It stores a gradient of the table per row, so it gets some rows at a time.
        """
        heads, m = self.values.shape[0], kv.shape[-1]
        first, last = self.values[:, :1], self.values[:, -1:]
        table = torch.cat([self.values, first.expand(-1, m), last.expand(-1, m)], dim=1)

        def read(positions: Tensor) -> Tensor:
            index = self._entries(positions, kv)
            shape = (index.shape[0], max(heads, index.shape[1]), index.shape[2])
            return table[:, None].expand(*shape, -1).gather(3, index.expand(*shape, -1))

        if not self._is_differentiated or torch.compiler.is_compiling():  # a graph serves every number of rows
            return read(positions)
        return torch.cat([read(rows) for rows in positions.split(_ROWS_AT_ONCE, dim=2)], dim=2)

    def _entries(self, positions: Tensor, kv: Tensor) -> Tensor:
        """Return indices ``(batch or 1, heads or 1, n, m)`` into the values and their ``m`` copies in :meth:`_rows`."""
        entries, m = self.values.shape[1], kv.shape[-1]
        index = (kv if kv.ndim > 1 else kv[None])[:, None, None] - positions[..., None] + self.zero
        copy = torch.arange(entries, entries + m, device=kv.device)
        return torch.where(index < 0, copy, torch.where(index < entries, index, copy + m))

    def _index(self, b: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> Tensor:
        positions = q + self._shift(q_len, kv_len) if self.positions is None else self.positions[b, q]
        return (kv - positions + self.zero).clamp(0, self.values.shape[1] - 1)

    def add_gradient_(self, grad: Tensor, grad_scores: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> None:
        if grad.shape[0] == 1:
            grad_scores = grad_scores.sum(1, keepdim=True)
        if not self.per_sample:
            grad_scores = grad_scores.sum(0, keepdim=True)
            if _are_consecutive(q) and _are_consecutive(kv):  # the diagonals are the row of the last query
                diagonals = _sums_of_diagonals(grad_scores[0])
                q, kv = q[-1:], kv[0] + torch.arange(diagonals.shape[1], device=kv.device)
                grad_scores = diagonals[None, :, None]
        positions = self._positions(q, q_len, kv_len)
        if self.positions is not None:  # sum the rows of queries at equal positions, which have equal entries
            distinct, row = positions.unique(return_inverse=True)
            by_head = grad_scores.transpose(0, 1).flatten(1, 2)  # (heads or 1, batch * n, m)
            rows = by_head.new_zeros((len(by_head), len(distinct), len(kv)))
            grad_scores, positions = rows.index_add_(1, row.flatten(), by_head)[None], distinct[None, None]
        index = self._entries(positions, kv).expand_as(grad_scores)
        entries, m = grad.shape[1], len(kv)
        rows = grad_scores.new_zeros((*grad_scores.shape[:3], entries + 2 * m)).scatter_(3, index, grad_scores)
        values, first, last = rows.sum((0, 2)).to(grad.dtype).split([entries, m, m], dim=1)
        grad.add_(values)
        grad[:, 0].add_(first.sum(1))
        grad[:, -1].add_(last.sum(1))

    def block_key(self, tile: Tile) -> tuple[int, ...] | None:
        if self.positions is not None:
            return None
        *shape, distance = tile.shape_and_distance
        if self.values.shape[1] == 1:  # the same value for all distances
            return tuple(shape)
        return (*shape, distance - self._shift(tile.q_len, tile.kv_len))


@dataclass(frozen=True, eq=False)
class DenseBias(Bias):
    """A bias with a separate value for every pair of query and key.

    Attributes:
        values: finite values ``(batch or 1, heads or 1, q_len, kv_len)``. To hide keys, use a mask.

    Example:
        >>> import torch, attnzoo
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> attnzoo.attention(q, k, v, bias=attnzoo.DenseBias(torch.zeros(1, 2, 5, 5))).shape
        torch.Size([1, 2, 5, 8])
    """

    kind: ClassVar[str] = "dense"

    @property
    def per_sample(self) -> bool:
        return self.values.shape[0] > 1

    def _check_sizes(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        shape = tuple(self.values.shape)
        if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2:] != (q_len, kv_len):
            raise InvalidArgumentError(
                "bias", f"`values` of shape {shape}", f"shape (1 or {batch}, 1 or {heads}, {q_len}, {kv_len})"
            )

    def gather(self, q_len: int, kv_len: int) -> BiasAt:
        per_sample, per_head = self.values.shape[0] > 1, self.values.shape[1] > 1

        def bias_at(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return self.values[b if per_sample else torch.zeros_like(b), h if per_head else torch.zeros_like(h), q, kv]

        return bias_at

    def block(self, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> Tensor:
        b, h = (torch.arange(n, device=q.device) for n in self.values.shape[:2])
        q = q[None, None, :, None] if q.ndim == 1 else q[..., None]
        keys = (kv if kv.ndim > 1 else kv[None])[:, None, None]
        return self.values[b[:, None, None, None], h[None, :, None, None], q, keys]

    def of_query(self, query: int, q_len: int, kv_len: int) -> Tensor:
        return self.values[:, :, query : query + 1]

    def add_gradient_(self, grad: Tensor, grad_scores: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> None:
        for dim in (0, 1):
            if grad.shape[dim] == 1:
                grad_scores = grad_scores.sum(dim, keepdim=True)
        grad[:, :, int(q[0]) : int(q[-1]) + 1, int(kv[0]) : int(kv[-1]) + 1] += grad_scores
