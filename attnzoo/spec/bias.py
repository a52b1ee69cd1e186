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

    def score_mod(self, q_len: int, kv_len: int) -> ScoreMod:
        """Return a function ``f(score, b, h, q, kv)`` that adds the bias of query ``q`` and key ``kv`` to ``score``."""
        bias_at = self.gather(q_len, kv_len)
        return lambda score, b, h, q, kv: score + bias_at(b, h, q, kv)

    def gather(self, q_len: int, kv_len: int) -> BiasAt:
        """Return a function ``f(b, h, q, kv)`` that maps broadcastable index tensors to bias values."""
        raise NotImplementedError

    def of_query(self, query: int, q_len: int, kv_len: int) -> Tensor | None:
        """Return the bias ``(batch or 1, heads or 1, 1, kv_len)`` of one query, or None if :meth:`gather` must be used.

        A decoding step needs the bias of only one query, which takes fewer operations than :meth:`gather`.
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

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        super().check(batch, heads, q_len, kv_len)
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
            if self.positions is not None and q.device.type == "cpu" and readable(self.positions):
                positions = self.positions[b, q]
                # If each head has another order of queries, positions differ between heads and rows are not equal.
                if positions.ndim == 4 and positions.shape[1] == 1 and kv.numel() == kv.shape[-1]:
                    return self._gather_rows(positions, kv)
            return self.values[h if per_head else torch.zeros_like(h), self._index(b, q, kv, q_len, kv_len)]

        return bias_at

    def of_query(self, query: int, q_len: int, kv_len: int) -> Tensor | None:
        if self.positions is not None:
            return None
        first = self.zero - query - self._shift(q_len, kv_len)  # the index of key 0, before the limits of the table
        index = torch.arange(first, first + kv_len, device=self.values.device).clamp_(0, self.values.shape[1] - 1)
        return self.values.index_select(1, index)[None, :, None]

    def _gather_rows(self, positions: Tensor, kv: Tensor) -> Tensor:
        """Return the bias ``(batch, heads or 1, n, m)`` for query ``positions`` ``(batch, 1, n, 1)`` and keys ``kv``.

        Queries at equal positions have equal bias values. This method gathers these values once and then copies them,
        because a copy is much faster than a gather.
        """
        distinct, row = positions.unique(return_inverse=True)
        index = (kv.reshape(1, -1) - distinct[:, None] + self.zero).clamp(0, self.values.shape[1] - 1)
        rows = self.values[:, index].index_select(1, row.flatten())  # (heads or 1, batch * n, m)
        return rows.unflatten(1, (positions.shape[0], positions.shape[2])).transpose(0, 1)

    def at_positions(self, positions: Tensor, kv_len: int) -> Tensor:
        """Return the bias ``(heads or 1, n, kv_len)`` of all keys for queries at ``positions`` ``(n,)``."""
        kv = torch.arange(kv_len, device=positions.device)
        index = (kv - positions[:, None] + self.zero).clamp(0, self.values.shape[1] - 1)
        return self.values.index_select(1, index.flatten()).view(-1, *index.shape)

    def _index(self, b: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> Tensor:
        positions = q + self._shift(q_len, kv_len) if self.positions is None else self.positions[b, q]
        return (kv - positions + self.zero).clamp(0, self.values.shape[1] - 1)

    def add_gradient_(self, grad: Tensor, grad_scores: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> None:
        if grad.shape[0] == 1:
            grad_scores = grad_scores.sum(1, keepdim=True)
        if not self.per_sample:
            grad_scores = grad_scores.sum(0, keepdim=True)
            if _are_consecutive(q) and _are_consecutive(kv):
                diagonals = _sums_of_diagonals(grad_scores[0])
                first = int(kv[0]) - int(q[-1]) - self._shift(q_len, kv_len) + self.zero
                index = torch.arange(first, first + diagonals.shape[1], device=q.device)
                grad.index_add_(1, index.clamp(0, grad.shape[1] - 1), diagonals.to(grad.dtype))
                return
        samples = torch.arange(grad_scores.shape[0], device=q.device)[:, None, None]
        index = self._index(samples, q[:, None], kv, q_len, kv_len).expand(len(samples), len(q), len(kv))
        by_head = grad_scores.transpose(0, 1).flatten(1)
        grad.scatter_add_(1, index.reshape(1, -1).expand(by_head.shape[0], -1), by_head.to(grad.dtype))

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

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        super().check(batch, heads, q_len, kv_len)
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

    def of_query(self, query: int, q_len: int, kv_len: int) -> Tensor:
        return self.values[:, :, query : query + 1]

    def add_gradient_(self, grad: Tensor, grad_scores: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> None:
        for dim in (0, 1):
            if grad.shape[dim] == 1:
                grad_scores = grad_scores.sum(dim, keepdim=True)
        grad[:, :, int(q[0]) : int(q[-1]) + 1, int(kv[0]) : int(kv[-1]) + 1] += grad_scores
