"""The cases of the conformance kit: attentions that every backend must either compute correctly or refuse."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.conformance.random_attention import BATCH, LENGTH, random_attention
from attnzoo.conformance.transform_check import CHECKED_TRANSFORMS
from attnzoo.spec.chosen_blocks import ChosenBlocks
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, SortedChunks, Window
from attnzoo.spec.segments import FLOATS, Attention, Request, SegmentRequest

PATTERNS: tuple[Pattern, ...] = (
    Full(),
    Causal(),
    Causal(offset=0),
    Window(5, 3),
    Window(9, 0),
    Chunks(8, 1, 1),
    Chunks(5, 2, 0, causal=True),
    SortedChunks(8, 1, 0, causal=True),
    SortedChunks(5, 1, 1),
)
MASKS = ("none", "keys", "dense", "globals")
BIASES = ("none", "relative", "dense", "trained relative", "trained dense")
_HEADS, _HEAD_DIM = 4, 16
_LONG = 530  # more than the largest block of queries of a backend, which is 512
_UNEVEN_VALUE_DIM, _UNEVEN_VALUE_DIM_OF_KERNELS = 20, 24  # kernels support only multiples of 8


@dataclass(frozen=True)
class AttentionCase:
    """One attention of the kit.

    Attributes:
        dtype: dtype of query, key and value.
        pattern: pattern of the first segment.
        mask: ``"none"``, ``"keys"``, ``"dense"``, ``"globals"`` or ``"queries"``. With ``"keys"``, the first sample has
            padding on the left, the second on the right, and the third is only padding. ``"globals"`` adds a segment of
            global keys, and makes some queries padding. ``"queries"`` makes some queries padding, and hides no key.
        bias: bias of the first segment, from ``BIASES``. With ``"trained ..."``, the bias values require grad.
        kv_heads: number of key heads. The number of query heads is 4.
        q_len: number of queries.
        kv_len: number of keys.
        grad: whether the inputs require grad.
        dropout: probability of dropping a softmax weight.
        uneven: whether value_dim differs from head_dim.
        probabilities: whether the softmax weights are requested.
        strided: whether head_dim is not the innermost dimension of query, key and value in memory.
        batch: number of samples, at most 3.
        reversed: whether the order of the samples in the masks is reversed. A backend that reuses the masks of an
            earlier attention with an equal request then fails.
        other_shapes: whether masks and biases have other broadcast dimensions (:func:`random_attention`).
        empty: whether queries that see no key get a random output instead of zeros.
        softcap: whether the scores are limited.
        transform: one of ``CHECKED_TRANSFORMS``, which runs the attention under ``torch.func``. Empty means none.
    """

    dtype: torch.dtype = torch.float32
    pattern: Pattern = Full()
    mask: str = "none"
    bias: str = "none"
    kv_heads: int = 4
    q_len: int = LENGTH
    kv_len: int = LENGTH
    grad: bool = True
    dropout: float = 0.0
    uneven: bool = False
    probabilities: bool = False
    strided: bool = False
    batch: int = BATCH
    reversed: bool = False
    other_shapes: bool = False
    empty: bool = False
    softcap: bool = False
    transform: str = ""

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), str(self.pattern), f"mask {self.mask}", f"bias {self.bias}"]
        parts.append(f"{_HEADS}/{self.kv_heads} heads, {self.q_len} x {self.kv_len}, batch {self.batch}")
        flags = (
            "grad",
            "dropout",
            "uneven",
            "probabilities",
            "strided",
            "reversed",
            "other_shapes",
            "empty",
            "softcap",
        )
        parts += [flag for flag in flags if getattr(self, flag)]
        return ", ".join([*parts, *([f"under {self.transform}"] if self.transform else [])])

    def request(self, device: str = "cpu") -> Request:
        """Return the request of the case on a device."""
        is_sorted = isinstance(self.pattern, SortedChunks)
        first = SegmentRequest(
            self.pattern,
            _HEADS if is_sorted else self.kv_heads,
            key_mask=self.mask in ("keys", "globals") and not is_sorted,
            mask=self.mask == "dense",
            bias=None if self.bias == "none" else self.bias.split()[-1],
            bias_grad=self.grad and self.bias.startswith("trained"),
        )
        segments = [first]
        if is_sorted or isinstance(self.pattern, HashedChunks):
            segments.append(first)  # a second hash round
        elif self.mask == "globals":
            segments.append(SegmentRequest(Full(), self.kv_heads, key_mask=True))
        value_dim = _UNEVEN_VALUE_DIM if self.uneven else _HEAD_DIM
        return Request(
            device,
            self.dtype,
            _HEADS,
            _HEAD_DIM,
            value_dim,
            tuple(segments),
            dropout=self.dropout > 0.0,
            grad=self.grad,
            probabilities=self.probabilities,
            softcap=self.softcap,
        )

    def attention(self, device: str = "cpu", seed: int = 0) -> Attention:
        """Return the attention of the case with random tensors. For sorted keys, the pattern contains the padding."""
        attention = random_attention(
            self.request(device),
            q_len=self.q_len,
            kv_len=self.kv_len,
            batch=self.batch,
            dropout=self.dropout,
            query_mask=self.mask in ("globals", "queries"),
            padded_tokens=self.mask == "keys",
            strided=self.strided,
            other_shapes=self.other_shapes,
            empty=self.empty,
            seed=seed,
        )
        return _with_reversed_masks(attention) if self.reversed else attention


def _with_reversed_masks(attention: Attention) -> Attention:
    def flipped(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.flip(0)

    segments = tuple(replace(s, key_mask=flipped(s.key_mask), mask=flipped(s.mask)) for s in attention.segments)
    return replace(attention, segments=segments, query_mask=flipped(attention.query_mask))


@dataclass(frozen=True)
class RequestCase:
    """A case for a given request, e.g. for one cell of the support matrix."""

    request: Request
    transform: ClassVar[str] = ""

    @property
    def probabilities(self) -> bool:
        return self.request.probabilities

    def attention(self, device: str = "cpu", seed: int = 0) -> Attention:
        """Return an attention with random tensors. For cross-attention, there are fewer keys than queries."""
        pattern = self.request.segments[0].pattern
        kv_len = LENGTH - 12 if isinstance(pattern, Full) and pattern.cross else LENGTH
        query_mask = any(segment.key_mask for segment in self.request.segments)
        return random_attention(replace(self.request, device=device), kv_len=kv_len, query_mask=query_mask, seed=seed)


def shrink(request: Request) -> Request:
    """Return a smaller request of equal structure: four heads, narrower windows and shorter chunks."""
    segments = tuple(
        replace(segment, pattern=_shrunk(segment.pattern), kv_heads=_HEADS * segment.kv_heads // request.heads or 1)
        for segment in request.segments
    )
    value_dim = _HEAD_DIM if request.value_dim == request.head_dim else _UNEVEN_VALUE_DIM_OF_KERNELS
    return replace(request, heads=_HEADS, head_dim=_HEAD_DIM, value_dim=value_dim, segments=segments)


def _shrunk(pattern: Pattern) -> Pattern:
    if isinstance(pattern, Window):
        return replace(pattern, left=min(pattern.left, 7), right=min(pattern.right, 5))
    if isinstance(pattern, Chunks | ChosenBlocks):
        return replace(pattern, length=min(pattern.length, 8))
    return pattern


def cases(dtypes: tuple[torch.dtype, ...] = FLOATS) -> Iterator[AttentionCase]:
    """Yield all cases of the kit in the given dtypes. The cases do not depend on the backend."""
    for dtype, pattern, mask, bias in itertools.product(dtypes, PATTERNS, MASKS, BIASES):
        if mask == "globals" and bias != "none":
            continue
        if isinstance(pattern, SortedChunks) and (mask not in ("none", "keys") or bias.endswith("dense")):
            continue
        for kv_heads, grad in ((_HEADS, True), (1, False)):
            yield AttentionCase(dtype, pattern, mask, bias, kv_heads, grad=grad)
        if mask in ("keys", "dense") and bias == "none" and not isinstance(pattern, SortedChunks):
            yield AttentionCase(dtype, pattern, mask, reversed=True)
    for dtype, mask in itertools.product(dtypes, MASKS):
        for pattern in (Full(), Causal(), Window(5, 3)):
            yield AttentionCase(dtype, pattern, mask, kv_heads=2, q_len=5, kv_len=23)
            yield AttentionCase(dtype, pattern, mask, kv_heads=2, q_len=1, kv_len=1)
            yield AttentionCase(dtype, pattern, mask, kv_heads=2, q_len=1, kv_len=23, batch=1)
            yield AttentionCase(dtype, pattern, mask, kv_heads=2, q_len=23, kv_len=9)
            yield AttentionCase(dtype, pattern, mask, dropout=0.25)
            yield AttentionCase(dtype, pattern, mask, dropout=0.25, grad=False, probabilities=True)
            yield AttentionCase(dtype, pattern, mask, uneven=True)
            yield AttentionCase(dtype, pattern, mask, strided=True)
            yield AttentionCase(dtype, pattern, mask, grad=False, probabilities=True)
        if mask in ("none", "keys"):
            yield AttentionCase(dtype, SortedChunks(8, 1, 0, causal=True), mask, dropout=0.25)
        for hashed in (HashedChunks(5, 1, 0, causal=True), HashedChunks(4, 1, 1, min_distance=2)):
            if mask != "globals":
                yield AttentionCase(dtype, hashed, mask)
                yield AttentionCase(dtype, hashed, mask, kv_heads=2, q_len=5, kv_len=23)
                yield AttentionCase(dtype, hashed, mask, kv_heads=1, dropout=0.25)
                yield AttentionCase(dtype, hashed, mask, uneven=True, grad=False)
        yield AttentionCase(dtype, ChosenBlocks(8), mask)
        yield AttentionCase(dtype, ChosenBlocks(3), mask, kv_heads=2, q_len=5, kv_len=23)
        yield AttentionCase(dtype, ChosenBlocks(8), mask, kv_heads=1, dropout=0.25)
        yield AttentionCase(dtype, ChosenBlocks(8), mask, uneven=True, grad=False, strided=True)
        if mask == "none":
            yield AttentionCase(dtype, HashedChunks(5), mask, bias="trained relative")
            yield AttentionCase(dtype, ChosenBlocks(5), mask, bias="trained relative")
            yield AttentionCase(dtype, SortedChunks(8, 1, 1), mask, uneven=True)
    yield from _cases_with_unequal_lengths(dtypes)
    yield from _cases_with_other_shapes(dtypes)
    yield from _cases_with_softcap(dtypes)
    # The oracle is slow on long inputs and under transforms, so these cases use only two dtypes.
    for dtype in [dtype for dtype in dtypes if dtype in (torch.float32, torch.bfloat16)]:
        for pattern in PATTERNS:
            mask = "keys" if isinstance(pattern, SortedChunks) else "globals"
            yield AttentionCase(dtype, pattern, mask, kv_heads=2, q_len=_LONG, kv_len=_LONG, batch=2)
        yield AttentionCase(dtype, ChosenBlocks(32), "globals", kv_heads=2, q_len=_LONG, kv_len=_LONG, batch=2)
        for pattern, mask, bias in (
            (Window(5, 3), "none", "trained relative"),
            (Causal(), "keys", "trained dense"),
            (Full(), "dense", "none"),
        ):
            yield AttentionCase(dtype, pattern, mask, bias, q_len=_LONG, kv_len=_LONG, batch=2)
        yield from _transformed_cases(dtype)


def _cases_with_unequal_lengths(dtypes: tuple[torch.dtype, ...]) -> Iterator[AttentionCase]:
    """Yield cases of ``q_len != kv_len`` with as many key heads as query heads, for backends without ``gqa``.

    With equal lengths, ``offset=None`` and ``offset=0`` show the same keys. ``Chunks`` needs equal lengths.
    """
    with_cache = partial(AttentionCase, q_len=5, kv_len=23)
    for dtype in dtypes:
        for pattern in (Full(), Causal(), Causal(offset=0), Window(5, 3), Window(5, 3, offset=0)):
            yield with_cache(dtype, pattern)
            yield AttentionCase(dtype, pattern, q_len=1, kv_len=23)
            yield AttentionCase(dtype, pattern, q_len=23, kv_len=9)
        for other in (Causal(offset=7), Window(5, 3, offset=7), HashedChunks(5, 1, 0, causal=True), ChosenBlocks(3)):
            yield with_cache(dtype, other)
        for mask, bias in (("keys", "none"), ("dense", "none"), ("none", "relative"), ("none", "dense")):
            yield with_cache(dtype, Causal(), mask, bias)


def _cases_with_other_shapes(dtypes: tuple[torch.dtype, ...]) -> Iterator[AttentionCase]:
    """Yield cases of padding queries, other broadcast dimensions, ``empty``, and few queries with a bias."""
    trained = ("trained relative", "trained dense")
    for dtype, pattern in itertools.product(dtypes, (Full(), Causal(), Window(5, 3))):
        yield AttentionCase(dtype, pattern, "queries")
        yield AttentionCase(dtype, pattern, "dense", other_shapes=True)
        yield AttentionCase(dtype, pattern, "keys", empty=True)
        yield AttentionCase(dtype, pattern, "dense", empty=True, grad=False)
        for bias in trained:
            yield AttentionCase(dtype, pattern, bias=bias, kv_heads=2, q_len=5, kv_len=23)
            yield AttentionCase(dtype, pattern, bias=bias, other_shapes=True)
            yield AttentionCase(dtype, pattern, "queries", bias)


def _cases_with_softcap(dtypes: tuple[torch.dtype, ...]) -> Iterator[AttentionCase]:
    for dtype in dtypes:
        yield AttentionCase(dtype, Full(), "keys", kv_heads=2, softcap=True)
        yield AttentionCase(dtype, Causal(), "none", "trained relative", softcap=True)
        yield AttentionCase(dtype, Causal(), "none", "relative", grad=False, softcap=True)
        yield AttentionCase(dtype, Window(5, 3), "globals", grad=False, softcap=True)
        yield AttentionCase(dtype, Chunks(8, 1, 1), "dense", "dense", softcap=True)


def _transformed_cases(dtype: torch.dtype) -> Iterator[AttentionCase]:
    for transform, mask in itertools.product(CHECKED_TRANSFORMS, MASKS):
        for pattern in (Full(), Causal(offset=0), Window(5, 3), Chunks(8, 1, 1)):
            yield AttentionCase(dtype, pattern, mask, transform=transform)
        yield AttentionCase(dtype, Causal(), mask, kv_heads=2, q_len=5, kv_len=23, transform=transform)
        if mask in ("none", "keys"):
            yield AttentionCase(dtype, SortedChunks(8, 1, 0, causal=True), mask, transform=transform)
            yield AttentionCase(dtype, ChosenBlocks(8), mask, transform=transform)
    for transform, bias in itertools.product(CHECKED_TRANSFORMS, ("relative", "trained relative", "trained dense")):
        yield AttentionCase(dtype, Window(5, 3), "keys", bias, transform=transform)
