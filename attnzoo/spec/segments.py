"""Data types that describe an attention: one softmax over one or more segments of keys.

A segment contains keys, values and a pattern (which query sees which key), and optionally masks and a bias. The softmax
normalises over the visible keys of all segments together.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, replace
from functools import lru_cache
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
    """Return a description for messages: shape, dtype and device of a tensor, or type and value of other objects."""
    if isinstance(given, Tensor):
        return f"shape {tuple(given.shape)}, {str(given.dtype).removeprefix('torch.')} on {given.device}"
    shape, dtype = getattr(given, "shape", None), getattr(given, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{type(given).__module__}.{type(given).__name__} of shape {shape}, {dtype}"
    return f"{type(given).__name__} {shorten(_BRIEF.repr(given), 120)}"


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys and values. A query sees a key if the pattern, the key mask and the mask all allow the key.

    Attributes:
        key: ``(batch, kv_heads, kv_len, head_dim)``.
        value: ``(batch, kv_heads, kv_len, value_dim)``.
        pattern: the key positions that each query position sees.
        key_mask: ``(batch, kv_len)`` bool, False for padding keys. None means no padding.
        mask: ``(batch or 1, heads or 1, q_len, kv_len)`` bool, True if the query sees the key. None means no mask.
        bias: the values that are added to the scores. None means no bias.
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
        """Return bool ``(batch or 1, heads or 1, n, m)``, True if the query sees the key, or None if all are True.

        ``q`` ``(n,)`` and ``kv`` ``(m,)`` are query indices and key indices. ``q_len`` is the number of all queries.
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

    def bias_at(self, q: Tensor, kv: Tensor, q_len: int) -> Tensor | None:
        """Return the bias values ``(batch or 1, heads or 1, n, m)`` for queries and keys, or None without a bias.

        ``q`` ``(n,)`` or ``(batch, heads, n)`` are query indices. ``kv`` ``(m,)`` or ``(batch, m)`` are key indices,
        each at most once per sample.
        """
        return None if self.bias is None else self.bias.block(q, kv, q_len, self.kv_len)


@dataclass(frozen=True)
class SegmentRequest:
    """The hashable properties of a segment that decide which backends support the segment."""

    pattern: Pattern
    kv_heads: int
    key_mask: bool = False
    mask: bool = False
    bias: str | None = None
    bias_grad: bool = False


@dataclass(frozen=True)
class Request:
    """The hashable properties of an attention that decide which backends support the attention.

    Attributes:
        transforms: the active function transforms (:func:`attnzoo.spec.transforms.transforms_around`).
        softcap: whether the scores are limited.
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
    softcap: bool = False


@dataclass(frozen=True, eq=False)
class Attention:
    """The inputs of ``softmax(scale * query @ keys.T + bias) @ values`` over the visible keys of all segments.

    Attributes:
        query: ``(batch, heads, q_len, head_dim)``.
        segments: the keys and values. ``heads`` must be a multiple of the ``kv_heads`` of each segment. Query head
            ``h`` uses key head ``h // (heads // kv_heads)``.
        scale: the factor on the scores.
        dropout: the probability in ``[0, 1)`` of dropping a softmax weight.
        query_mask: ``(batch, q_len)`` bool, False for padding queries, whose output is zero. None means no padding.
        empty: ``(batch, heads, q_len, value_dim)``, the output of queries that see no key. None means zeros. Dropout
            also applies to ``empty``, with one random choice per query and head.
        softcap: the limit of the absolute scores, as in Gemma 2 (arXiv:2408.00118). The product ``score = scale * query
            @ key`` becomes ``softcap * tanh(score / softcap)`` before the bias is added. None means no limit.

    Raises:
        InvalidArgumentError: a tensor has the wrong rank, or does not fit the other tensors.

    Example:
        >>> import torch, attnzoo
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> attention = attnzoo.Attention(q, (attnzoo.Segment(k, v, attnzoo.Causal()),), scale=8**-0.5)
        >>> attention.request().segments[0].pattern
        Causal(offset=None)
    """

    query: Tensor
    segments: tuple[Segment, ...]
    scale: float
    dropout: float = 0.0
    query_mask: Tensor | None = None
    empty: Tensor | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return  # sizes may be symbols; the operator in the graph makes the same attention with real sizes
        # Every layer of every decoding step runs these checks. Reading a shape takes longer than comparing numbers, so
        # the checks read each shape once.
        query = self.query
        if not self.segments:
            check_heads_tensors(query=query)
            raise InvalidArgumentError("segments", "()", "a tuple of at least one Segment")
        dropout, scale = self.dropout, self.scale
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise InvalidArgumentError("dropout", repr(dropout), "a probability in [0, 1)")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise InvalidArgumentError("scale", repr(scale), "a finite number")
        if self.softcap is not None:
            _check_softcap(self.softcap)
        for segment in self.segments:
            self._check_segment(segment)
        if self.query_mask is not None:
            _check_mask("query_mask", self.query_mask, ((self.batch, self.q_len),), query.device)
        if self.empty is not None:
            shape, empty = (self.batch, self.heads, self.q_len, self.value_dim), self.empty
            if (tuple(empty.shape), empty.dtype, empty.device) != (shape, query.dtype, query.device):
                raise InvalidArgumentError("empty", describe(empty), f"shape {shape}, {query.dtype} on {query.device}")

    def _check_segment(self, segment: Segment) -> None:
        query, key, value = self.query, segment.key, segment.value
        check_heads_tensors(query=query, key=key, value=value)
        dtype, device = query.dtype, query.device
        batch, heads, q_len, head_dim = query.shape
        for name, tensor in (("key", key), ("value", value)):
            if tensor.dtype != dtype:
                raise InvalidArgumentError(f"{name} dtype", tensor.dtype, f"{dtype}, like the query")
            if tensor.device != device:
                raise InvalidArgumentError(f"{name} device", tensor.device, f"{device}, like the query")
        key_batch, kv_heads, kv_len, key_dim = key.shape
        value_batch, value_heads, value_len, value_dim = value.shape
        for name, size in (("key", key_batch), ("value", value_batch)):
            if size != batch:
                raise InvalidArgumentError(f"{name} batch", size, f"{batch}, like the query")
        if kv_heads != value_heads or kv_len != value_len:
            raise InvalidArgumentError(
                "value", describe(value), f"shape {tuple(key.shape[:3])} + (value_dim,), like the key"
            )
        if key_dim != head_dim:
            raise InvalidArgumentError("key head_dim", key_dim, f"{head_dim}, like the query")
        if heads % kv_heads:
            raise InvalidArgumentError("key heads", kv_heads, f"a divisor of the {heads} query heads")
        if segment is not self.segments[0] and value_dim != self.value_dim:
            raise InvalidArgumentError("value_dim", value_dim, f"{self.value_dim}, as in the first segment")
        segment.pattern.check(batch, heads, q_len, kv_len)
        if segment.key_mask is not None:
            _check_mask("key_mask", segment.key_mask, ((batch, kv_len),), device)
        if segment.mask is not None:
            dense = tuple((b, h, q_len, kv_len) for b in {1, batch} for h in {1, heads})
            _check_mask("mask", segment.mask, dense, device)
        if segment.bias is not None:
            segment.bias.check(batch, heads, q_len, kv_len)
            if segment.bias.values.device != device:
                raise InvalidArgumentError("bias device", segment.bias.values.device, f"{device}, like the query")

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
        """Return all tensors that can get a gradient: query, then key, value and bias per segment, then empty."""
        tensors = [self.query]
        for segment in self.segments:
            tensors += [segment.key, segment.value]
            if segment.bias is not None:
                tensors.append(segment.bias.values)
        return tuple(tensors) if self.empty is None else (*tensors, self.empty)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Attention:
        """Return a copy of the attention with new tensors, given in the order of :meth:`tensors`."""
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

    def fill(self, output: Tensor, has_visible_key: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Return ``output`` with zeros for padding queries, and :attr:`empty` or zeros for queries that see no key.

        Args:
            output: ``(batch, heads, n, value_dim)``. The rows of queries that see no key may contain any finite values.
            has_visible_key: bool, broadcastable to ``(batch, heads, n)``. None means that every query sees a key.
            rows: ``(n,)``, the query index of each row of ``output``. None means all queries in order.
        """
        index = slice(None) if rows is None else rows
        if has_visible_key is not None and self.empty is None:
            output = output.masked_fill(~has_visible_key[..., None], 0.0)
        elif has_visible_key is not None and self.empty is not None:
            empty = self.empty[:, :, index]
            if self.dropout > 0.0:
                empty = empty * torch.nn.functional.dropout(torch.ones_like(empty[..., :1]), self.dropout)
            output = torch.where(has_visible_key[..., None], output, empty)
        if self.query_mask is not None:
            output = output.masked_fill(~self.query_mask[:, None, index, None], 0.0)
        return output

    def request(self, probabilities: bool = False) -> Request:
        """Return the request: the hashable properties that decide which backends support this attention."""
        grad, query, tensors = torch.is_grad_enabled(), self.query, self.tensors()
        segments = []
        for segment in self.segments:
            bias = segment.bias
            has_masks = segment.key_mask is not None, segment.mask is not None
            of_bias = (None, False) if bias is None else (bias.kind, grad and bias.values.requires_grad)
            segments.append((segment.pattern.structure, segment.key.shape[1], *has_masks, *of_bias))
        return _request(
            query.device,
            query.dtype,
            query.shape[1],
            query.shape[3],
            self.segments[0].value.shape[3],
            tuple(segments),
            self.dropout > 0.0,
            grad and any(tensor.requires_grad for tensor in tensors),
            probabilities,
            transforms_around(tensors),
            self.softcap is not None,
        )


@lru_cache(maxsize=1024)  # a model makes few different requests, and a look-up takes a third of the time of building
def _request(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    value_dim: int,
    segments: tuple[tuple[Pattern, int, bool, bool, str | None, bool], ...],
    dropout: bool,
    grad: bool,
    probabilities: bool,
    transforms: tuple[str, ...],
    softcap: bool,
) -> Request:
    of_segments = tuple(SegmentRequest(*segment) for segment in segments)
    flags = (dropout, grad, probabilities, transforms, softcap)
    return Request(device.type, dtype, heads, head_dim, value_dim, of_segments, *flags)


class Result(NamedTuple):
    """The return value of :meth:`Backend.run`.

    Attributes:
        output: ``(batch, heads, q_len, value_dim)`` in the query's dtype.
        kernel: the name of the kernel that ran, e.g. ``"flash_cpu"``.
        probabilities: the softmax weights ``(batch, heads, q_len, kv_len)`` of each segment before dropout. None means
            that the caller did not request them.
        dropped: the softmax weights of each segment after dropout, or None if ``probabilities`` is None.
    """

    output: Tensor
    kernel: str
    probabilities: tuple[Tensor, ...] | None = None
    dropped: tuple[Tensor, ...] | None = None


def _check_softcap(softcap: object) -> None:
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0.0 < softcap < math.inf:
        raise InvalidArgumentError("softcap", repr(softcap), "a finite number > 0, or None")


def check_heads_tensors(**tensors: object) -> None:
    """Raise unless each tensor is dense, non-empty, floating-point, and ``(batch, heads, length, head_dim)``."""
    for name, tensor in tensors.items():
        allowed = "of shape (batch, heads, length, head_dim), with all sizes at least 1"
        if not isinstance(tensor, Tensor):
            raise InvalidArgumentError(name, describe(tensor), f"a tensor {allowed}")
        if tensor.is_nested or tensor.layout != torch.strided:
            raise InvalidArgumentError(name, "a nested or sparse tensor", f"a dense tensor {allowed}")
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise InvalidArgumentError(name, describe(tensor), f"a tensor {allowed}")
        if tensor.dtype not in FLOATS:
            raise InvalidArgumentError(f"{name} dtype", tensor.dtype, ", ".join(map(str, FLOATS)))


def _check_mask(name: str, mask: object, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        has_nan = isinstance(mask, Tensor) and mask.is_floating_point() and holds(mask.isnan().any(), unknown=False)
        got = describe(mask) + (", with NaN" if has_nan else "")
        raise InvalidArgumentError(
            name, got, f"a bool tensor of shape {' or '.join(map(str, sorted(shapes)))} (True: visible)"
        )
    if mask.device != device:
        raise InvalidArgumentError(f"{name} device", mask.device, f"{device}, like the query")
