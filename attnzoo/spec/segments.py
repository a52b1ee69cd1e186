"""What is computed: a union softmax over segments. Plain data; no device code.

``query`` looks at one or more *segments* of keys. Each segment has a pattern (who sees whom), maybe masks and a bias;
one softmax normalises over all of them together.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError, shorten
from attnzoo.spec.bias import Bias
from attnzoo.spec.patterns import Full, Pattern
from attnzoo.spec.transforms import holds, transforms_around

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(given: object) -> str:
    """A tensor as shape, dtype and device; another library's array as shape and dtype; else type and value."""
    if isinstance(given, Tensor):
        return f"{tuple(given.shape)} {str(given.dtype).removeprefix('torch.')} on {given.device}"
    shape, dtype = getattr(given, "shape", None), getattr(given, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{type(given).__module__}.{type(given).__name__} {shape} {dtype}"
    return f"{type(given).__name__} {shorten(_BRIEF.repr(given), 120)}"


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys a query may look at, and the terms on which it does.

    Attributes:
        key: ``(batch, kv_heads, kv_len, head_dim)``.
        value: ``(batch, kv_heads, kv_len, value_dim)``.
        pattern: who sees whom by position.
        key_mask: ``(batch, kv_len)`` bool, True where the key may be seen (False: padding), or None.
        mask: ``(batch or 1, heads or 1, q_len, kv_len)`` bool, True where visible, or None. Dense: not for long inputs.
        bias: added to the scores.
    """

    key: Tensor
    value: Tensor
    pattern: Pattern = Full()
    key_mask: Tensor | None = None
    mask: Tensor | None = None
    bias: Bias | None = None

    @property
    def kv_len(self) -> int:
        return self.key.shape[2]

    def visible(self, q: Tensor, kv: Tensor, q_len: int) -> Tensor | None:
        """Which keys are seen: bool ``(batch or 1, heads or 1, n, m)`` for indices ``q`` (n,) and ``kv`` (m,).

        None when the segment has no restriction at all.
        """
        seen: Tensor | None = None
        if not isinstance(self.pattern, Full):
            b, h = self.pattern.batch_and_heads(q.device)
            seen = self.pattern.mask_mod(q_len, self.kv_len)(b, h, q[None, None, :, None], kv[None, None, None, :])
        if self.key_mask is not None:
            keys = self.key_mask[:, None, None, kv]
            seen = keys if seen is None else seen & keys
        if self.mask is not None:
            dense = self.mask[:, :, q][..., kv]
            seen = dense if seen is None else seen & dense
        return seen

    def bias_at(self, q: Tensor, kv: Tensor, q_len: int, batch: int, heads: int) -> Tensor | None:
        """The bias ``(batch or 1, heads or 1, n, m)`` for indices ``q`` (n,) or (batch, heads, n), and ``kv`` (m,)."""
        if self.bias is None:
            return None
        q = q[None, None, :, None] if q.ndim == 1 else q[..., None]
        b = torch.arange(batch if self.bias.per_sample else 1, device=q.device)[:, None, None, None]
        h = torch.arange(heads, device=q.device)[None, :, None, None]
        return self.bias.gather(q_len, self.kv_len)(b, h, q, kv[None, None, None, :])


@dataclass(frozen=True)
class SegmentRequest:
    """What selection needs to know of a segment: hashable, no tensors."""

    pattern: Pattern
    kv_heads: int
    key_mask: bool = False
    mask: bool = False
    bias: str | None = None
    bias_grad: bool = False


@dataclass(frozen=True)
class Request:
    """What selection needs to know of an attention: hashable, no tensors, no lengths.

    ``transforms`` names the function transforms it runs under (:func:`attnzoo.spec.transforms.transforms_around`).
    """

    device: str
    dtype: torch.dtype
    heads: int
    head_dim: int
    value_dim: int
    segments: tuple[SegmentRequest, ...]
    dropout: bool = False
    grad: bool = False
    probabilities: bool = False
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention, whole: ``softmax(scale * query @ keys.T + bias) @ values`` over all visible keys of all segments.

    Attributes:
        query: ``(batch, heads, q_len, head_dim)``.
        segments: what the queries look at; ``heads`` must be a multiple of each segment's ``kv_heads``, and query head
            ``h`` uses key head ``h // (heads // kv_heads)``.
        scale: factor on the scores.
        dropout: probability with which a softmax weight is dropped.
        query_mask: ``(batch, q_len)`` bool; rows where it is False (padding) give zeros.
        empty: ``(batch, heads, q_len, value_dim)``, what rows give that see no key at all; None: zeros. It counts as
            one value of weight 1, which dropout may drop.

    Raises:
        InvalidArgumentError: wrong rank, or shapes, dtypes or devices that do not fit together.
    """

    query: Tensor
    segments: tuple[Segment, ...]
    scale: float
    dropout: float = 0.0
    query_mask: Tensor | None = None
    empty: Tensor | None = None

    def __post_init__(self) -> None:
        check_heads_tensor("query", self.query)
        if not self.segments:
            raise InvalidArgumentError("segments", "none", "at least one segment")
        if (
            isinstance(self.dropout, bool)
            or not isinstance(self.dropout, (int, float))
            or not 0.0 <= self.dropout < 1.0
        ):
            raise InvalidArgumentError("dropout", repr(self.dropout), "a probability in [0, 1)")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise InvalidArgumentError("scale", repr(self.scale), "a finite number")
        _check_mask("query_mask", self.query_mask, ((self.batch, self.q_len),), self.query.device)
        for segment in self.segments:
            self._check_segment(segment)
        shape = (self.batch, self.heads, self.q_len, self.value_dim)
        own = (shape, self.query.dtype, self.query.device)
        if self.empty is not None and (tuple(self.empty.shape), self.empty.dtype, self.empty.device) != own:
            raise InvalidArgumentError("empty", describe(self.empty), f"{shape} {self.query.dtype} on {own[2]}")

    def _check_segment(self, segment: Segment) -> None:
        query, key, value = self.query, segment.key, segment.value
        for name, tensor in (("key", key), ("value", value)):
            check_heads_tensor(name, tensor)
            if tensor.shape[0] != self.batch:
                raise InvalidArgumentError(f"{name} batch", tensor.shape[0], f"{self.batch}, the query's")
            if tensor.dtype != query.dtype:
                raise InvalidArgumentError(f"{name} dtype", tensor.dtype, f"{query.dtype}, the query's")
            if tensor.device != query.device:
                raise InvalidArgumentError(f"{name} device", tensor.device, f"{query.device}, the query's")
        if key.shape[:3] != value.shape[:3]:
            raise InvalidArgumentError("value", describe(value), f"{tuple(key.shape[:3])} + (value_dim,), as the key")
        if key.shape[3] != query.shape[3]:
            raise InvalidArgumentError("key head_dim", key.shape[3], f"{query.shape[3]}, the query's")
        if self.heads % key.shape[1]:
            raise InvalidArgumentError("key heads", key.shape[1], f"a divisor of the query's {self.heads}")
        if value.shape[3] != self.value_dim:
            raise InvalidArgumentError("value_dim", value.shape[3], f"{self.value_dim}, as in the first segment")
        lengths = (self.q_len, segment.kv_len)
        segment.pattern.check(self.batch, self.heads, *lengths)
        _check_mask("key_mask", segment.key_mask, ((self.batch, lengths[1]),), query.device)
        dense = tuple((b, h, *lengths) for b in {1, self.batch} for h in {1, self.heads})
        _check_mask("mask", segment.mask, dense, query.device)
        if segment.bias is not None:
            segment.bias.check(self.batch, self.heads, *lengths)
            if segment.bias.values.device != query.device:
                raise InvalidArgumentError("bias device", segment.bias.values.device, f"{query.device}, the query's")

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def q_len(self) -> int:
        return self.query.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def value_dim(self) -> int:
        return self.segments[0].value.shape[3]

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor a gradient may flow to: query, then key, value (and bias values) of each segment, then empty."""
        found = [self.query]
        for segment in self.segments:
            found += [segment.key, segment.value]
            if segment.bias is not None:
                found.append(segment.bias.values)
        return tuple(found) if self.empty is None else (*found, self.empty)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Attention:
        """The same attention on other tensors, in the order of :meth:`tensors`."""
        rest = iter(tensors)
        query = next(rest)
        segments = []
        for old in self.segments:
            segment = replace(old, key=next(rest), value=next(rest))
            if old.bias is not None:
                segment = replace(segment, bias=replace(old.bias, values=next(rest)))
            segments.append(segment)
        empty = None if self.empty is None else next(rest)
        return replace(self, query=query, segments=tuple(segments), empty=empty)

    def fill(self, output: Tensor, live: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Finish an output: rows that see nothing become :attr:`empty` or zero, and padding rows zero.

        Args:
            output: ``(batch, heads, n, value_dim)``, anything finite in rows that see nothing.
            live: bool, broadcastable to ``(batch, heads, n)``: rows that see a key; None: all of them.
            rows: ``(n,)`` which query rows these are; None: all, in order.
        """
        every = slice(None) if rows is None else rows
        if live is not None and self.empty is None:
            output = output.masked_fill(~live[..., None], 0.0)
        elif live is not None and self.empty is not None:
            empty = self.empty[:, :, every]
            if self.dropout > 0.0:
                empty = empty * torch.nn.functional.dropout(torch.ones_like(empty[..., :1]), self.dropout)
            output = torch.where(live[..., None], output, empty)
        if self.query_mask is not None:
            output = output.masked_fill(~self.query_mask[:, None, every, None], 0.0)
        return output

    def request(self, probabilities: bool = False) -> Request:
        """The hashable summary that backends are selected by."""
        grad, tensors = torch.is_grad_enabled(), self.tensors()
        return Request(
            device=self.query.device.type,
            dtype=self.query.dtype,
            heads=self.heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            segments=tuple(
                SegmentRequest(
                    pattern=segment.pattern.structure,
                    kv_heads=segment.key.shape[1],
                    key_mask=segment.key_mask is not None,
                    mask=segment.mask is not None,
                    bias=None if segment.bias is None else segment.bias.kind,
                    bias_grad=grad and segment.bias is not None and segment.bias.values.requires_grad,
                )
                for segment in self.segments
            ),
            dropout=self.dropout > 0.0,
            grad=grad and any(tensor.requires_grad for tensor in tensors),
            probabilities=probabilities,
            transforms=transforms_around(tensors),
        )


class Result(NamedTuple):
    """What a backend returns.

    Attributes:
        output: ``(batch, heads, q_len, value_dim)``, in the query's dtype.
        kernel: the kernel that really ran, e.g. ``"flash_cpu"``.
        probabilities: per segment ``(batch, heads, q_len, kv_len)`` softmax weights before dropout, if asked for.
        dropped: the same after dropout.
    """

    output: Tensor
    kernel: str
    probabilities: tuple[Tensor, ...] | None = None
    dropped: tuple[Tensor, ...] | None = None


def check_heads_tensor(name: str, tensor: object) -> None:
    """Raise unless this is a floating-point tensor ``(batch, heads, length, head_dim)`` without an empty dimension."""
    allowed = "(batch, heads, length, head_dim), none of them 0"
    if isinstance(tensor, Tensor) and (tensor.is_nested or tensor.layout != torch.strided):
        raise InvalidArgumentError(name, "a nested or sparse tensor", f"a dense tensor {allowed}")
    if not isinstance(tensor, Tensor) or tensor.ndim != 4 or 0 in tensor.shape:
        raise InvalidArgumentError(name, describe(tensor), f"a tensor {allowed}")
    if tensor.dtype not in FLOATS:
        raise InvalidArgumentError(f"{name} dtype", tensor.dtype, ", ".join(map(str, FLOATS)))


def _check_mask(name: str, mask: object, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        nan = isinstance(mask, Tensor) and mask.is_floating_point() and holds(mask.isnan().any(), unknown=False)
        got = describe(mask) + (" with NaN in it" if nan else "")
        raise InvalidArgumentError(name, got, f"bool, True where visible, {' or '.join(map(str, sorted(shapes)))}")
    if mask.device != device:
        raise InvalidArgumentError(f"{name} device", mask.device, f"{device}, the query's")
