"""Additive biases: what is added to the scores before the softmax, with exact gradients for learned tables.

Like a pattern, a bias states its truth once, in FlexAttention's language, as ``score_mod(score, b, h, q, kv)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.transforms import readable

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


@dataclass(frozen=True, eq=False)
class Bias:
    """Base class. ``kind`` is what capabilities and requests speak of."""

    kind: ClassVar[str] = "none"
    values: Tensor

    @property
    def per_sample(self) -> bool:
        """Whether the bias differs between the samples of a batch."""
        return False

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        """Raise :class:`InvalidArgumentError` unless the values fit an attention of this size."""
        if not isinstance(self.values, Tensor) or not self.values.is_floating_point():
            got = f"{tuple(self.values.shape)} {self.values.dtype}" if isinstance(self.values, Tensor) else self.values
            raise InvalidArgumentError("bias values", got, "a floating-point tensor; to hide keys, mask=")

    def score_mod(self, q_len: int, kv_len: int) -> ScoreMod:
        """The truth: score plus bias, for broadcastable index tensors."""
        add = self.gather(q_len, kv_len)
        return lambda score, b, h, q, kv: score + add(b, h, q, kv)

    def gather(self, q_len: int, kv_len: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """A function of broadcastable index tensors that returns the bias at them."""
        raise NotImplementedError

    def block_key(
        self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int
    ) -> tuple[int, ...] | None:
        """A key such that blocks of equal key have equal biases (so that a kernel may reuse one), or None."""
        return None

    def add_gradient_(self, grad: Tensor, grad_scores: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> None:
        """Add what a block of scores contributes to the gradient of :attr:`values`.

        Args:
            grad: the gradient so far, in the shape of the values.
            grad_scores: ``(batch, heads, n, m)``, of the scores of queries ``q`` (n,) and keys ``kv`` (m,).
            q: query indices.
            kv: key indices.
            q_len: queries in all.
            kv_len: keys in all.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class RelativeBias(Bias):
    """A bias that depends on the head and on ``key position - query position`` alone (T5; Raffel et al. 2020).

    Attributes:
        values: ``(heads or 1, R)``; ``values[h, zero + d]`` is added where the key lies ``d`` tokens after the query.
            Distances beyond either end take the end's value, so bucketed tables need only their unsaturated range.
            To train a bucket table, gather from it: ``table[bucket(distances)].T``; gradients flow through.
        zero: index of distance 0.
        offset: key position of query 0; None aligns the last query with the last key.
        positions: ``(batch, q_len)`` long, the position of each query among the keys, where it is not
            ``q + offset`` (queries that look at one key per block of tokens are at their block's position); or None.
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
            got = f"values {tuple(self.values.shape)}, zero={self.zero!r}"
            raise InvalidArgumentError("bias", got, f"(1 or {heads}, R) and 0 <= zero < R, an integer")
        if self.offset is not None and not _is_integer(self.offset):
            raise InvalidArgumentError("bias offset", repr(self.offset), "an integer, or None")
        if self.positions is not None and not isinstance(self.positions, Tensor):
            raise InvalidArgumentError("bias positions", repr(self.positions), f"a tensor ({batch}, {q_len}), or None")
        if self.positions is not None and tuple(self.positions.shape) != (batch, q_len):
            raise InvalidArgumentError("bias positions", tuple(self.positions.shape), f"({batch}, {q_len})")
        if self.positions is not None and (
            self.positions.dtype != torch.long or self.positions.device != self.values.device
        ):
            got = f"{self.positions.dtype} on {self.positions.device}"
            raise InvalidArgumentError("bias positions", got, f"torch.int64 on {self.values.device}, as the values")

    def gather(self, q_len: int, kv_len: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        per_head = self.values.shape[0] > 1

        def add(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            positions, one_row = self.positions, q.device.type == "cpu" and kv.numel() == kv.shape[-1]
            if positions is not None and one_row and readable(positions):
                return self._by_position(positions[b, q], kv)
            return self.values[h if per_head else torch.zeros_like(h), self._index(b, q, kv, q_len, kv_len)]

        return add

    def _by_position(self, at: Tensor, kv: Tensor) -> Tensor:
        """The bias of queries at positions ``at`` (batch, 1, n, 1): looked up once per position, then copied by rows.

        Neighbouring queries share positions (all tokens of a block have one), and copying a row is much faster than
        looking its entries up.
        """
        positions, row = at.unique(return_inverse=True)
        index = (kv.reshape(1, -1) - positions[:, None] + self.zero).clamp(0, self.values.shape[1] - 1)
        rows = self.values[:, index].index_select(1, row.flatten())  # (heads or 1, batch * n, m)
        return rows.unflatten(1, (at.shape[0], at.shape[2])).transpose(0, 1)

    def _index(self, b: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> Tensor:
        """Which value stands at a query and a key."""
        shift = kv_len - q_len if self.offset is None else self.offset
        at = q + shift if self.positions is None else self.positions[b, q]
        return (kv - at + self.zero).clamp(0, self.values.shape[1] - 1)

    def add_gradient_(self, grad: Tensor, grad_scores: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> None:
        if grad.shape[0] == 1:
            grad_scores = grad_scores.sum(1, keepdim=True)
        if not self.per_sample:
            grad_scores = grad_scores.sum(0, keepdim=True)
        samples = torch.arange(grad_scores.shape[0], device=q.device)[:, None, None]
        index = self._index(samples, q[:, None], kv, q_len, kv_len).expand(len(samples), len(q), len(kv))
        by_head = grad_scores.transpose(0, 1).flatten(1)
        grad.scatter_add_(1, index.reshape(1, -1).expand(by_head.shape[0], -1), by_head.to(grad.dtype))

    def block_key(
        self, q_start: int, q_stop: int, kv_start: int, kv_stop: int, q_len: int, kv_len: int
    ) -> tuple[int, ...] | None:
        if self.positions is not None:
            return None
        shift = kv_len - q_len if self.offset is None else self.offset
        return (q_start + shift - kv_start, q_stop - q_start, kv_stop - kv_start)


@dataclass(frozen=True, eq=False)
class DenseBias(Bias):
    """A bias given at every place.

    Attributes:
        values: ``(batch or 1, heads or 1, q_len, kv_len)``, finite: to hide keys, use a mask.
    """

    kind: ClassVar[str] = "dense"

    @property
    def per_sample(self) -> bool:
        return self.values.shape[0] > 1

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        super().check(batch, heads, q_len, kv_len)
        shape = tuple(self.values.shape)
        if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2:] != (q_len, kv_len):
            raise InvalidArgumentError("bias", f"values {shape}", f"(1 or {batch}, 1 or {heads}, {q_len}, {kv_len})")

    def gather(self, q_len: int, kv_len: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        per_sample, per_head = self.values.shape[0] > 1, self.values.shape[1] > 1

        def add(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return self.values[b if per_sample else torch.zeros_like(b), h if per_head else torch.zeros_like(h), q, kv]

        return add

    def add_gradient_(self, grad: Tensor, grad_scores: Tensor, q: Tensor, kv: Tensor, q_len: int, kv_len: int) -> None:
        for dim in (0, 1):
            if grad.shape[dim] == 1:
                grad_scores = grad_scores.sum(dim, keepdim=True)
        grad[:, :, int(q[0]) : int(q[-1]) + 1, int(kv[0]) : int(kv[-1]) + 1] += grad_scores
