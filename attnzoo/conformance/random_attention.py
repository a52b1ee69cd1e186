"""Random attentions for the conformance kit and the support matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.spec.bias import Bias, DenseBias, RelativeBias
from attnzoo.spec.chosen_blocks import ChosenBlocks
from attnzoo.spec.global_keys import find_global_keys
from attnzoo.spec.hashed import HashedChunks, HashRound
from attnzoo.spec.patterns import Full, SortedChunks
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest

LENGTH = 37  # number of queries and of keys, not a multiple of any block size
CHOSEN = 2  # number of blocks of keys that a block of queries sees with ChosenBlocks
FEW_KEYS = 6  # number of keys of every segment after the first
BATCH = 3
SOFTCAP = 1.5  # small enough to change scores, whose standard deviation is 1


def random_attention(
    request: Request,
    *,
    q_len: int = LENGTH,
    kv_len: int = LENGTH,
    batch: int = BATCH,
    dropout: float = 0.25,
    query_mask: bool = False,
    padded_tokens: bool = False,
    strided: bool = False,
    other_shapes: bool = False,
    empty: bool = False,
    seed: int = 0,
) -> Attention:
    """Return an attention with random tensors and the given request.

    All hash rounds have the same keys. In other attentions, each segment after the first has :data:`FEW_KEYS` keys.
    There is one exception: if the request has two segments with key masks and the second is :class:`Full`, the second
    contains global keys, which are taken from the first segment, as in LED.

    Args:
        request: request of the attention. The ``start`` of each ``SortedChunks`` is replaced.
        q_len: number of queries. With ``SortedChunks``, each hash round also has this number of keys.
        kv_len: number of keys of the first segment.
        batch: number of samples, at most 3.
        dropout: probability of dropping a softmax weight, ignored if the request has no dropout.
        query_mask: whether a fifth of the queries, chosen at random, is padding.
        padded_tokens: whether the first third of the tokens is padding. Used only for ``SortedChunks``.
        strided: whether ``head_dim`` is not the innermost dimension of query, key and value in memory.
        other_shapes: whether a dense mask differs between heads instead of samples, a dense bias between samples
            instead of heads, and a relative bias has one table for all heads and a position for each query.
        empty: whether queries that see no key get a random output instead of zeros. Always True for ``SortedChunks``.
    """
    draw = _Draw(request, q_len, kv_len, batch, strided, other_shapes, torch.Generator().manual_seed(seed))
    query = draw.normal(batch, request.heads, q_len, request.head_dim)
    first, output = request.segments[0], None
    if isinstance(first.pattern, SortedChunks):
        segments, output = draw.sorted_rounds(padded_tokens)
    elif isinstance(first.pattern, HashedChunks):
        segments = draw.hashed_rounds(first.pattern)
    elif first.key_mask and request.segments[1:] == (SegmentRequest(Full(), first.kv_heads, key_mask=True),):
        segments = draw.with_global_keys()
    else:
        segments = tuple(map(draw.segment, range(len(request.segments))))
    masked_queries = draw.flags(batch, q_len, p=0.8) if query_mask else None
    if empty and output is None:
        output = draw.normal(batch, request.heads, q_len, request.value_dim)
    scale, dropout = request.head_dim**-0.5, dropout if request.dropout else 0.0
    softcap = SOFTCAP if request.softcap else None
    return Attention(query, segments, scale, dropout, masked_queries, output, softcap)


@dataclass(frozen=True)
class _Draw:
    """Factory of the random tensors of one attention. Equal seeds give equal tensors on all devices."""

    request: Request
    q_len: int
    kv_len: int
    batch: int
    strided: bool
    other_shapes: bool
    random: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.random, dtype=torch.float64)
        drawn = drawn.to(device=self.request.device, dtype=self.request.dtype)
        if self.strided and len(shape) == 4:
            drawn = drawn.transpose(-1, -2).contiguous().transpose(-1, -2)
        return drawn.requires_grad_(self.request.grad)

    def flags(self, *shape: int, p: float) -> Tensor:
        return (torch.rand(shape, generator=self.random) < p).to(self.request.device)

    def order(self, *shape: int) -> Tensor:
        """Return random permutations along the last dimension."""
        return torch.rand(shape, generator=self.random).argsort(-1)

    def segment(self, index: int) -> Segment:
        kv_len = FEW_KEYS if index else self.kv_len
        kv_heads = self.request.segments[index].kv_heads
        key = self.normal(self.batch, kv_heads, kv_len, self.request.head_dim)
        value = self.normal(self.batch, kv_heads, kv_len, self.request.value_dim)
        return self._with_bias_and_masks(index, key, value)

    def with_global_keys(self) -> tuple[Segment, ...]:
        """Return the first segment without global keys, and a segment of global keys if any sample has global keys."""
        segment = self.segment(0)
        real = self._padding(segment.kv_len)
        is_global = self.flags(self.batch, segment.kv_len, p=0.2) & real
        global_keys = find_global_keys(is_global)
        if global_keys is None:
            return (replace(segment, key_mask=real),)
        key, value = global_keys.take(segment.key), global_keys.take(segment.value)
        return replace(segment, key_mask=real & ~is_global), Segment(key, value, key_mask=global_keys.valid)

    def hashed_rounds(self, pattern: HashedChunks) -> tuple[Segment, ...]:
        """Return one segment per hash round, with random orders of keys and ranks of queries."""
        segment, rounds, segments = self.segment(0), tuple[HashRound, ...](), []
        kv_heads, device = segment.key.shape[1], self.request.device
        for _ in self.request.segments:
            keys = self.order(self.batch, kv_heads, self.kv_len)
            shape = (self.batch, self.request.heads, self.q_len)
            places = torch.randint(0, self.kv_len, shape, generator=self.random)
            chunks = (torch.arange(self.kv_len) // pattern.length).repeat(self.batch, 1)
            parts = (keys, keys.argsort(-1), chunks, places.argsort(-1), places)
            rounds = (*rounds, HashRound(*(part.to(device) for part in parts)))
            segments.append(replace(segment, pattern=replace(pattern, rounds=rounds)))
        return tuple(segments)

    def sorted_rounds(self, padded_tokens: bool) -> tuple[tuple[Segment, ...], Tensor]:
        """Return one segment per hash round, with randomly sorted keys, and :attr:`Attention.empty`."""
        kv_heads = self.request.segments[0].kv_heads
        group = self.request.heads // kv_heads
        key = self.normal(self.batch, kv_heads, self.q_len, self.request.head_dim)
        value = self.normal(self.batch, kv_heads, self.q_len, self.request.value_dim)
        orders = [self.order(self.batch, kv_heads, self.q_len).to(key.device) for _ in self.request.segments]
        token = torch.cat(orders, dim=2)
        if padded_tokens:
            token = token.masked_fill(token < self.q_len // 3, -1)
        index, token = token.clamp(min=0)[..., None], token.repeat_interleave(group, 1)
        key, sorted_value = (part.gather(2, index.expand(-1, -1, -1, part.shape[3])) for part in (key, value))
        segments = []
        for number, (request, order) in enumerate(zip(self.request.segments, orders, strict=True)):
            assert isinstance(request.pattern, SortedChunks)
            order = order.repeat_interleave(group, 1)
            pattern = replace(request.pattern, start=number * self.q_len, order=order, token=token)
            segments.append(replace(self._with_bias_and_masks(number, key, sorted_value), pattern=pattern))
        return tuple(segments), value.repeat_interleave(group, 1)

    def _with_bias_and_masks(self, index: int, key: Tensor, value: Tensor) -> Segment:
        request, kv_len = self.request.segments[index], key.shape[2]
        bias = self._bias(request, kv_len) if request.bias else None
        sizes = (1, self.request.heads) if self.other_shapes else (self.batch, 1)
        mask = self.flags(*sizes, self.q_len, kv_len, p=0.6) if request.mask else None
        key_mask = self._padding(kv_len) if request.key_mask else None
        pattern = request.pattern
        if isinstance(pattern, ChosenBlocks):
            pattern = replace(pattern, chosen=self._chosen(pattern.length, kv_len))
        return Segment(key, value, pattern, key_mask, mask, bias)

    def _chosen(self, length: int, kv_len: int) -> Tensor:
        """Return random blocks of keys for each block of queries, and no block for a fifth of the choices."""
        shape = (self.batch, self.request.heads, -(-self.q_len // length), CHOSEN)
        drawn = torch.randint(0, -(-kv_len // length), shape, generator=self.random)
        none = torch.rand(shape, generator=self.random) < 0.2
        return drawn.masked_fill(none, -1).to(self.request.device)

    def _padding(self, kv_len: int) -> Tensor:
        """Return a key mask of up to three samples: padding on the left, padding on the right, and only padding."""
        real = torch.ones((BATCH, kv_len), dtype=torch.bool, device=self.request.device)
        real[0, : kv_len // 3] = False
        real[1, kv_len - kv_len // 4 :] = False
        real[2] = False
        return real[: self.batch].contiguous()

    def _bias(self, request: SegmentRequest, kv_len: int) -> Bias:
        if request.bias == RelativeBias.kind:
            values = self._bias_values(request, 1 if self.other_shapes else self.request.heads, 21)
            return RelativeBias(values, zero=10, positions=self._positions(kv_len) if self.other_shapes else None)
        sizes = (self.batch, 1) if self.other_shapes else (1, self.request.heads)
        return DenseBias(self._bias_values(request, *sizes, self.q_len, kv_len))

    def _bias_values(self, request: SegmentRequest, *shape: int) -> Tensor:
        return self.normal(*shape).detach().requires_grad_(request.bias_grad)

    def _positions(self, kv_len: int) -> Tensor:
        drawn = torch.randint(0, kv_len, (self.batch, self.q_len), generator=self.random)
        return drawn.to(self.request.device)
