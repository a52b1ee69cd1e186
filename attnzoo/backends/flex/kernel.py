"""Compiled FlexAttention. All attentions of equal *form* share one kernel, even if their lengths differ.

A form contains everything that the compiled code depends on, for example the kind of pattern of each segment, the
dtype, the scale, and which lengths are 1 (a compiler treats 1 as a constant). The form does not contain other lengths,
windows, offsets and bias values. In the compiled code, lengths are symbols (dynamic shapes). Windows, offsets and bias
values are tensors. So a new length needs no new compilation. Three measures ensure this:

- Each form has a separate function, because the compiler limits the number of compilations of one function. This
  function raises if torch.compile is off, because FlexAttention would then compute whole ``q_len x kv_len`` grids.
- The function is compiled on example tensors whose sizes differ, because the compiler uses one symbol for equal sizes.
- ``mask_mod`` and ``score_mod`` read flat tensors with ``embedding``. Indexing would need the sizes of these tensors,
  and PyTorch's CPU kernels (seen in 2.13) use a wrong size if the size is a symbol. Only trained bias values are
  indexed, because PyTorch's backward of FlexAttention computes gradients only for indexing. Only CUDA has a backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attnzoo.backends.common.block_lists import BlockLists, BlockShape
from attnzoo.errors import BackendRefusedError, Refusal

_UNCOMPILED = Refusal(
    "torch.compile",
    "disabled, e.g. by torch.compiler.set_stance",
    "enabled, because uncompiled FlexAttention stores q_len x kv_len scores",
)


class Form(NamedTuple):
    """Everything that the compiled code of a kernel depends on."""

    is_chunked: tuple[bool, ...]  # per segment: True if the pattern is Chunks, False if the pattern is a band
    has_bias: bool  # whether a relative bias is added
    has_positions: tuple[bool, ...]  # per segment: whether the bias reads the positions of the queries
    scale: float
    has_softcap: bool
    block: BlockShape
    dtype: torch.dtype
    device: torch.device
    threads: int  # a CPU kernel is compiled for this number of threads
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    is_single: tuple[bool, ...]  # which of batch, q_len and number of keys are 1
    trained: tuple[bool, ...]  # which of query, key, value and table require grad; all False without a backward


Scalars = tuple[Tensor, ...]  # zero-dimensional, long


class Terms(NamedTuple):
    """The tensors from which the kernel computes masks and biases.

    ``patterns`` has seven numbers per segment. The first two are the start and the stop of the segment in the
    concatenated keys. The other five describe the pattern. For a band, they are the lowest distance, the highest
    distance and three zeros. For ``Chunks``, they are ``length``, ``before``, ``before + after``, the number of chunks,
    and ``causal``.
    """

    sizes: Scalars  # number of keys, number of table entries per head, number of queries
    patterns: tuple[Scalars, ...]  # per segment
    unpadded: Tensor  # (batch * keys,) bool, False for padding keys
    biases: tuple[Scalars, ...]  # per segment: index of distance 0, position of query 0, first and last table entry
    table: Tensor  # (heads * entries,) float, the concatenated bias values of all segments
    positions: tuple[Tensor, ...]  # per segment: (batch * q_len,) long positions of the queries, or zeros
    softcap: Tensor  # zero-dimensional float, the limit of the scores


CompiledKernel = Callable[[Tensor, Tensor, Tensor, BlockLists, Terms], Tensor]


@cache
def compiled_kernel(form: Form) -> CompiledKernel:
    """Return the compiled attention function of a form.

    The arguments of this function are query ``(batch, heads, q_len, head_dim)`` in the layout of :func:`in_rows`,
    contiguous keys and values ``(batch, kv_heads, keys, dim)`` of all segments, block lists and terms.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, lists: BlockLists, terms: Terms) -> Tensor:
        if not torch.compiler.is_compiling():  # compiled code does not contain this branch
            raise BackendRefusedError("flex_attention", {"attention": (_UNCOMPILED,)}, {})

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return _visible(form, terms, q, kv) & _lookup(terms.unpadded, b * terms.sizes[0] + kv)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            if form.has_softcap:
                score = terms.softcap * torch.tanh(score / terms.softcap)
            if not form.has_bias:
                return score
            entry = h * terms.sizes[1] + _bias_entry(form, terms, b, q, kv)
            return score + (terms.table[entry] if form.trained[-1] else _lookup(terms.table, entry))

        block_mask = BlockMask.from_kv_blocks(
            *lists,
            BLOCK_SIZE=(form.block.queries, form.block.keys),
            mask_mod=mask_mod,
            seq_lengths=(query.shape[2], key.shape[2]),
            compute_q_blocks=any(form.trained),
        )
        modified, scale = score_mod if form.has_bias or form.has_softcap else None, form.scale
        output: Tensor = flex_attention(query, key, value, modified, block_mask, scale, enable_gqa=True)
        return output

    # The compiler counts compilations per code object, so each form gets a separate code object.
    code = attend.__code__.replace(co_name=f"attend_{compiled_kernel.cache_info().misses}")
    function = FunctionType(code, attend.__globals__, code.co_name, None, attend.__closure__)
    compiled = torch.compile(function, dynamic=True, fullgraph=True, options={"assert_indirect_indexing": False})
    compiled(*_example(form))
    return compiled


def _lookup(flat: Tensor, index: Tensor) -> Tensor:
    return torch.nn.functional.embedding(index, flat[:, None]).squeeze(-1)


def _visible(form: Form, terms: Terms, q: Tensor, kv: Tensor) -> Tensor:
    """Return True where a pattern shows key ``kv`` (index in the concatenated keys) to query ``q``."""
    visible = None
    for number, is_chunked in enumerate(form.is_chunked):
        start, stop, *rest = terms.patterns[number]
        key = kv - start
        if is_chunked:
            length, before, reach, count, causal = rest
            near = (key // length - q // length + before) % count <= reach
            near = near & ((key <= q) | (causal == 0))
        else:
            near = (key - q >= rest[0]) & (key - q <= rest[1])
        near = near & (key >= 0) & (kv < stop) if len(form.is_chunked) > 1 else near
        visible = near if visible is None else visible | near
    return cast(Tensor, visible)


def _bias_entry(form: Form, terms: Terms, b: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """Return the index of the bias value of query ``q`` and key ``kv`` in the part of ``terms.table`` for one head."""
    entry = None
    for number, has_positions in enumerate(form.has_positions):
        zero, shift, first, last = terms.biases[number]
        start = terms.patterns[number][0]
        position = _lookup(terms.positions[number], b * terms.sizes[2] + q) if has_positions else q + shift
        in_segment = (kv - start - position + zero + first).clamp(first, last)
        entry = in_segment if entry is None else torch.where(kv < start, entry, in_segment)
    return cast(Tensor, entry)


def scalars(*values: int, device: torch.device) -> Scalars:
    """Return a separate tensor for each number. Views of one tensor would need a new compilation for each offset.

    The device fills the tensors. With ``torch.tensor``, the host would wait for the copy of each number.
    """
    return tuple(torch.full((), value, device=device) for value in values)


def in_rows(query: Tensor) -> Tensor:
    """Return the query ``(batch, heads, q_len, head_dim)`` in the memory layout for which kernels are compiled.

    torch.compile compiles again if the base of a view or the stride of a dimension of size 1 changes.
    """
    rows = query.transpose(1, 2).contiguous()
    rows = rows.view(rows.shape)
    return (rows if torch.is_grad_enabled() and rows.requires_grad else rows.detach()).transpose(1, 2)


def _example(form: Form) -> tuple[Tensor, Tensor, Tensor, BlockLists, Terms]:
    """Return example arguments whose sizes above 1 are all different. Empty block lists make the example fast."""
    taken = {form.heads, form.kv_heads, form.head_dim, form.value_dim}

    def fresh(size: int) -> int:
        while size in taken:
            size += 1
        taken.add(size)
        return size

    rows, columns = fresh(3), fresh(4)
    sizes = (2, rows * form.block.queries - 20, columns * form.block.keys - 20)
    batch, q_len, keys = (1 if single else fresh(size) for size, single in zip(sizes, form.is_single, strict=True))

    def zeros(*shape: int, dtype: torch.dtype, trained: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=form.device, requires_grad=trained)

    def states(length: int, count: int, dim: int, trained: bool) -> Tensor:
        return zeros(batch, count, length, dim, dtype=form.dtype, trained=trained)

    query = in_rows(states(q_len, form.heads, form.head_dim, form.trained[0]))
    key = states(keys, form.kv_heads, form.head_dim, form.trained[1])
    value = states(keys, form.kv_heads, form.value_dim, form.trained[2])
    counts, numbers = zeros(batch, 1, rows, dtype=torch.int32), zeros(batch, 1, rows, columns, dtype=torch.int32)
    terms = Terms(
        scalars(0, 0, 0, device=form.device),
        tuple(scalars(*[1] * 7, device=form.device) for _ in form.is_chunked),
        zeros(batch * keys, dtype=torch.bool),
        tuple(scalars(*[0] * 4, device=form.device) for _ in form.is_chunked),
        zeros(form.heads * 23, dtype=torch.float32, trained=form.trained[3]),
        tuple(zeros(batch * q_len if has_positions else 17, dtype=torch.long) for has_positions in form.has_positions),
        zeros(dtype=torch.float32),
    )
    return query, key, value, BlockLists(counts, numbers, counts.clone(), numbers.clone()), terms
