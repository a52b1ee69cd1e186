"""What the kernels need to know about an attention, without the tensors that may get gradients.

A *form* is a segment without keys, values and bias values. So a forward can keep the forms for its backward without
keeping these tensors, which autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from attnzoo.backends.common.blocks import passes
from attnzoo.backends.triton.hash_tables import HashTables, hash_tables
from attnzoo.backends.triton.kernels import arguments as kinds
from attnzoo.backends.triton.kernels.arguments import Grid, Hashes, Keys, Numbers, Rows, Settings, encoded
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Band, Chunks, Pattern, SortedChunks
from attnzoo.spec.segments import Attention, Segment

_MOST = 1 << 28  # larger than every index; sums of a few such numbers still fit 32 bits
_NONE = tl.constexpr(0)  # stands for a missing tensor, because a tuple of arguments must not contain None
_NO_GRID = Grid(_NONE, _NONE, _NONE, _NONE, _NONE)
_NO_HASHES = Hashes(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE)


@dataclass(frozen=True, eq=False)
class Form:
    """A segment without keys, values and bias values.

    Attributes:
        pattern: the pattern without tensors.
        group: the number of query heads per key head.
        key, value: the places of keys and values in :attr:`Inputs.keys_values`.
        bias: the kind of the bias, one of the constants of the kernels.
        bias_place: the place of the bias values in :attr:`Inputs.biases`.
        zero: the entry of a table for a key at the index of the query, or at its position.
        size: the number of entries of a table.
        order: the order of the queries in ``SortedChunks`` or ``HashedChunks``.
        token: the tokens of the keys in ``SortedChunks``.
        hashes: the tables of ``HashedChunks``.
    """

    pattern: Pattern
    kv_len: int
    group: int
    key: int
    value: int
    bias: int
    bias_place: int
    zero: int
    size: int
    key_mask: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    order: Tensor | None
    token: Tensor | None
    hashes: HashTables | None

    def masks(self) -> list[Tensor]:
        """Return the tensors without gradients that the kernels read."""
        hashes = () if self.hashes is None else self.hashes.tensors()
        tensors = (self.key_mask, self.mask, self.positions, self.order, self.token, *hashes)
        return [tensor for tensor in tensors if tensor is not None]

    @property
    def has_table(self) -> bool:
        """Whether the bias is a table."""
        return self.bias in (kinds.BY_DISTANCE.value, kinds.BY_POSITION.value)

    @property
    def needs_more(self) -> bool:
        """Whether a tile of scores needs more registers than usual."""
        return self.hashes is not None or bool(self.bias == kinds.DENSE_BIAS.value)


@dataclass(frozen=True, eq=False)
class Plan:
    """An attention without the tensors that may get gradients.

    Attributes:
        passes: the indices of the segments of each launch of the forward.
        sign: the sign of the scale: 1, -1 or 0. The kernels multiply queries by the sign.
        scale: the magnitude of the scale, or 1.0 if the scale is 0.
        softcap: the limit of the scores, or None.
    """

    batch: int
    heads: int
    q_len: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    forms: tuple[Form, ...]
    passes: tuple[tuple[int, ...], ...]
    sign: int
    scale: float
    dropout: float
    softcap: float | None
    query_mask: Tensor | None

    def masks(self) -> list[Tensor]:
        """Return the tensors without gradients that the kernels read."""
        masks = [tensor for form in self.forms for tensor in form.masks()]
        return masks if self.query_mask is None else [self.query_mask, *masks]

    def numbers(self, index: int) -> Numbers:
        """Return the integers of a segment."""
        form = self.forms[index]
        return _numbers(form.pattern, self.q_len, form.kv_len, form.zero, form.size)

    def band(self, index: int) -> Band:
        """Return the distances that may be visible in a segment that keeps the order of the queries."""
        form = self.forms[index]
        band = form.pattern.band(self.q_len, form.kv_len) or Band(-_MOST, _MOST)
        return Band(max(band.lowest, 1 - self.q_len), min(band.highest, form.kv_len - 1))

    def most_queries(self, index: int, keys: int) -> int:
        """Return about how many queries see at least one of ``keys`` neighbouring keys of a segment."""
        pattern = self.forms[index].pattern
        if isinstance(pattern, Chunks | HashedChunks):
            return min(self.q_len, (pattern.before + pattern.after + 1) * pattern.length + keys)
        band = self.band(index)
        return min(self.q_len, max(0, band.highest - band.lowest) + keys)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of an attention that may get gradients.

    Attributes:
        keys_values: the distinct keys and the distinct values. Segments may share tensors.
        biases: the bias values of the segments that have a bias.
    """

    query: Tensor
    keys_values: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    empty: Tensor | None


def split(attention: Attention) -> tuple[Plan, Inputs]:
    """Split an attention into a plan and the tensors that may get gradients."""
    # Segments may share keys or values. A tensor that is both keys and values has two places, because a kernel writes
    # the gradient of keys and the gradient of values to different tensors.
    places: list[tuple[str, Tensor]] = []
    biases: list[Tensor] = []

    def place(role: str, tensor: Tensor) -> int:
        for number, (known_role, known) in enumerate(places):
            if known is tensor and known_role == role:
                return number
        places.append((role, tensor))
        return len(places) - 1

    forms, tables = [], hash_tables(attention)
    for index, segment in enumerate(attention.segments):
        key, value = place("key", segment.key), place("value", segment.value)
        forms.append(_form(attention, segment, key, value, len(biases), tables.get(index)))
        if segment.bias is not None:
            biases.append(segment.bias.values)
    scale = float(attention.scale)  # Triton would compile separately for an integer, or a number of numpy
    plan = Plan(
        batch=attention.batch,
        heads=attention.heads,
        q_len=attention.q_len,
        head_dim=attention.head_dim,
        value_dim=attention.value_dim,
        dtype=attention.query.dtype,
        device=attention.query.device,
        forms=tuple(forms),
        passes=tuple(map(tuple, passes(attention))),
        sign=(scale > 0.0) - (scale < 0.0),
        scale=abs(scale) or 1.0,
        dropout=float(attention.dropout),
        softcap=None if attention.softcap is None else float(attention.softcap),
        query_mask=_contiguous(attention.query_mask),
    )
    keys_values = tuple(tensor for _, tensor in places)
    return plan, Inputs(attention.query, keys_values, tuple(biases), attention.empty)


def _form(
    attention: Attention, segment: Segment, key: int, value: int, bias_place: int, hashes: HashTables | None
) -> Form:
    pattern, bias = segment.pattern, segment.bias
    kind, zero, size, positions = kinds.NO_BIAS, 0, 1, None
    if isinstance(bias, RelativeBias):
        kind, zero, size, positions = kinds.BY_POSITION, bias.zero, bias.values.shape[1], bias.positions
        if positions is None:
            kind = kinds.BY_DISTANCE
            zero -= segment.kv_len - attention.q_len if bias.offset is None else bias.offset
    elif bias is not None:
        kind = kinds.DENSE_BIAS
    token = pattern.sorted_tensors()[1] if isinstance(pattern, SortedChunks) else None
    return Form(
        pattern=pattern.structure,
        kv_len=segment.kv_len,
        group=attention.heads // segment.key.shape[1],
        key=key,
        value=value,
        bias=int(kind.value),
        bias_place=bias_place,
        zero=zero,
        size=size,
        key_mask=_contiguous(segment.key_mask),
        mask=segment.mask,
        positions=_contiguous(positions),
        order=_contiguous(pattern.query_order),
        token=_contiguous(token),
        hashes=hashes,
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@lru_cache(maxsize=1024)
def _numbers(pattern: Pattern, q_len: int, kv_len: int, zero: int, size: int) -> Numbers:
    lowest = highest = before = reach = start = shift = apart = 0
    length = count = 1
    if isinstance(pattern, Chunks):
        length, count = pattern.length, -(-kv_len // pattern.length)
        before, reach = pattern.before % count, pattern.before + pattern.after
        start = pattern.start if isinstance(pattern, SortedChunks) else 0
    elif isinstance(pattern, HashedChunks):
        before, reach, apart = pattern.before, pattern.before + pattern.after, pattern.min_distance
        shift = kv_len - q_len if pattern.offset is None else pattern.offset
    else:
        band = pattern.band(q_len, kv_len)
        if band is None:
            raise NotImplementedError(f"got {pattern}, which has no band: the capabilities must not contain it")
        lowest, highest = band
    numbers = (kv_len, lowest, highest, length, before, reach, count, start, shift, apart, zero, size)
    return Numbers(*(encoded(max(-_MOST, min(_MOST, number))) for number in numbers))


def rows(tensor: Tensor) -> Rows:
    """Return a tensor ``(batch, heads, length, dim)`` as an argument. The last dimension must be contiguous."""
    return Rows(tensor, *tensor.stride()[:3])


def settings(plan: Plan, seed: Tensor | None) -> Settings:
    """Return what is the same for all segments as an argument of the kernels. ``seed`` is that of dropout."""
    return Settings(
        scale=plan.scale,
        cap=0.0 if plan.softcap is None else plan.softcap / plan.scale,
        dropout=plan.dropout,
        seed=_or_none(seed),
        sign=tl.constexpr(plan.sign),
        has_cap=tl.constexpr(int(plan.softcap is not None)),
        has_dropout=tl.constexpr(int(plan.dropout > 0.0)),
    )


def _grid(tensor: Tensor) -> Grid:
    strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Grid(tensor, *strides)


def keys_of(plan: Plan, inputs: Inputs, index: int, for_keys: bool = False) -> Keys:
    """Return a segment as an argument of the kernels. ``for_keys`` is whether of the kernel for keys and values."""
    form = plan.forms[index]
    values = inputs.biases[form.bias_place] if form.bias != kinds.NO_BIAS.value else None
    return Keys(
        key=rows(inputs.keys_values[form.key]),
        value=rows(inputs.keys_values[form.value]),
        key_mask=_or_none(form.key_mask),
        mask=_NO_GRID if form.mask is None else _grid(form.mask),
        table=values if form.has_table else _NONE,
        table_head=values.stride(0) if values is not None and form.has_table and values.shape[0] > 1 else 0,
        positions=_or_none(form.positions),
        dense=_grid(values) if values is not None and not form.has_table else _NO_GRID,
        order=_or_none(form.order),
        token=_or_none(form.token),
        hashes=_hashes(form, for_keys),
        kind=tl.constexpr(_kind(form.pattern)),
        earlier=tl.constexpr(0 if form.hashes is None else form.hashes.earlier),
        rounds=tl.constexpr(0 if form.hashes is None else form.hashes.rounds),
        causal=tl.constexpr(int(isinstance(form.pattern, Chunks | HashedChunks) and form.pattern.causal)),
        has_key_mask=tl.constexpr(int(form.key_mask is not None)),
        has_mask=tl.constexpr(int(form.mask is not None)),
        bias=tl.constexpr(form.bias),
        group=tl.constexpr(form.group),
    )


def _hashes(form: Form, for_keys: bool) -> Hashes:
    if form.hashes is None or form.order is None:
        return _NO_HASHES
    query_starts = form.hashes.query_starts(form.order) if for_keys else _NONE
    return Hashes(*form.hashes.tensors(), query_starts)


def _kind(pattern: Pattern) -> int:
    if isinstance(pattern, HashedChunks):
        return int(kinds.HASHED.value)
    if isinstance(pattern, SortedChunks):
        return int(kinds.SORTED.value)
    return int(kinds.CHUNKS.value if isinstance(pattern, Chunks) else kinds.BAND.value)


def _or_none(tensor: Tensor | None) -> Any:
    return _NONE if tensor is None else tensor


def tables(inputs: Inputs, plan: Plan) -> Inputs:
    """Return the inputs as kernels read them: rows contiguous, tables in float32 and divided by the scale."""
    biases = list(inputs.biases)
    for form in plan.forms:
        if form.has_table:
            table = biases[form.bias_place].detach().to(torch.float32)
            biases[form.bias_place] = (table if plan.scale == 1.0 else table / plan.scale).contiguous()
    empty = None if inputs.empty is None else with_contiguous_rows(inputs.empty)
    keys_values = tuple(map(with_contiguous_rows, inputs.keys_values))
    return Inputs(with_contiguous_rows(inputs.query), keys_values, tuple(biases), empty)


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
