"""Small attentions of random tensors that ask what a request says: for the cells of the support matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.spec.bias import Bias, DenseBias, RelativeBias
from attnzoo.spec.patterns import Chunks, Full, Pattern, SortedChunks, Window
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest

_BATCH, _HEADS, _DIM, _VALUE_DIM, _FEW = 3, 4, 16, 24, 6


def shrink(request: Request) -> Request:
    """The same structure in small: fewer heads, narrower windows, shorter chunks."""
    segments = tuple(
        replace(segment, pattern=_shrunk(segment.pattern), kv_heads=_HEADS * segment.kv_heads // request.heads or 1)
        for segment in request.segments
    )
    value_dim = _DIM if request.value_dim == request.head_dim else _VALUE_DIM
    return replace(request, heads=_HEADS, head_dim=_DIM, value_dim=value_dim, segments=segments)


def _shrunk(pattern: Pattern) -> Pattern:
    if isinstance(pattern, Window):
        return replace(pattern, left=min(pattern.left, 7), right=min(pattern.right, 5))
    return replace(pattern, length=min(pattern.length, 8)) if isinstance(pattern, Chunks) else pattern


@dataclass(frozen=True)
class Sample:
    """What :func:`attnzoo.testing.run_case` puts to a backend to see what it makes of a request.

    Attributes:
        request: what is asked; its device is the one that :meth:`attention` is given.
        length: queries, and keys of the first segment; other keys are few, or another sequence's.
    """

    request: Request
    length: int = 37

    @property
    def dtype(self) -> torch.dtype:
        return self.request.dtype

    @property
    def grad(self) -> bool:
        return self.request.grad

    @property
    def dropout(self) -> float:
        return 0.25 if self.request.dropout else 0.0

    @property
    def probabilities(self) -> bool:
        return self.request.probabilities

    def attention(self, device: str = "cpu", seed: int = 0) -> Attention:
        """An attention whose request is this one (but for the places of sorted rounds), on fresh random tensors."""
        draw = _Draw(torch.Generator().manual_seed(seed), device, self.dtype, self.grad)
        request, length = self.request, self.length
        query = draw.normal(_BATCH, request.heads, length, request.head_dim)
        padded = any(segment.key_mask for segment in request.segments)
        query_mask = draw.flags(_BATCH, length, p=0.8) if padded else None
        if any(isinstance(segment.pattern, SortedChunks) for segment in request.segments):
            segments, empty = self._sorted(draw)
            return Attention(query, segments, request.head_dim**-0.5, self.dropout, query_mask, empty)
        segments = tuple(self._segment(draw, *each) for each in enumerate(request.segments))
        return Attention(query, segments, request.head_dim**-0.5, self.dropout, query_mask)

    def _segment(self, draw: _Draw, index: int, asked: SegmentRequest) -> Segment:
        kv_len = _FEW if index else self.length
        if isinstance(asked.pattern, Full) and asked.pattern.cross:
            kv_len = self.length - 2 * _FEW
        key = draw.normal(_BATCH, asked.kv_heads, kv_len, self.request.head_dim)
        value = draw.normal(_BATCH, asked.kv_heads, kv_len, self.request.value_dim)
        return self._finish(draw, asked, Segment(key, value, asked.pattern))

    def _finish(self, draw: _Draw, asked: SegmentRequest, segment: Segment) -> Segment:
        """The segment with the masks and the bias that are asked for."""
        key_mask = draw.padding(segment.kv_len) if asked.key_mask else None
        mask = draw.flags(_BATCH, 1, self.length, segment.kv_len, p=0.6) if asked.mask else None
        bias = None
        if asked.bias is not None:
            bias = draw.bias(asked, self.request.heads, self.length, segment.kv_len)
        return replace(segment, key_mask=key_mask, mask=mask, bias=bias)

    def _sorted(self, draw: _Draw) -> tuple[tuple[Segment, ...], Tensor]:
        """Hash rounds on the keys of all rounds, in random orders; what rows that see nothing give."""
        asked = self.request.segments
        heads, group = asked[0].kv_heads, self.request.heads // asked[0].kv_heads
        orders = [draw.order(_BATCH, heads, self.length) for _ in asked]
        token = torch.cat(orders, dim=2)
        key = draw.normal(_BATCH, heads, self.length, self.request.head_dim)
        value = draw.normal(_BATCH, heads, self.length, self.request.value_dim)
        sorted_key, sorted_value = (
            tensor.gather(2, token[..., None].expand(-1, -1, -1, tensor.shape[3])) for tensor in (key, value)
        )
        segments = []
        for number, (one, order) in enumerate(zip(asked, orders, strict=True)):
            places = {"order": order.repeat_interleave(group, 1), "token": token.repeat_interleave(group, 1)}
            pattern = replace(one.pattern, start=number * self.length, **places)  # type: ignore[call-arg]
            segments.append(self._finish(draw, one, Segment(sorted_key, sorted_value, pattern)))
        return tuple(segments), value.repeat_interleave(group, 1)


@dataclass(frozen=True)
class _Draw:
    """Random tensors."""

    random: torch.Generator
    device: str
    dtype: torch.dtype
    grad: bool

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.random, dtype=torch.float64)
        return drawn.to(device=self.device, dtype=self.dtype).requires_grad_(self.grad)

    def flags(self, *shape: int, p: float) -> Tensor:
        return (torch.rand(shape, generator=self.random) < p).to(self.device)

    def padding(self, kv_len: int) -> Tensor:
        """Padding left, right, and all of a sample."""
        real = torch.ones((_BATCH, kv_len), dtype=torch.bool, device=self.device)
        real[0, : kv_len // 3] = False
        real[1, kv_len - kv_len // 4 :] = False
        real[2] = False
        return real

    def order(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random).argsort(-1).to(self.device)

    def bias(self, asked: SegmentRequest, heads: int, q_len: int, kv_len: int) -> Bias:
        relative = asked.bias == RelativeBias.kind
        shape = (heads, 21) if relative else (1, heads, q_len, kv_len)
        values = self.normal(*shape).detach().requires_grad_(asked.bias_grad)
        return RelativeBias(values, zero=10) if relative else DenseBias(values)
