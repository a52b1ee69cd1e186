"""FlexAttention, compiled: one kernel for every attention of the same *form*, whatever its lengths.

A form is what the kernel's code depends on: which kind of pattern each segment has, whether there is a bias, the scale,
the dtype, heads and their dimensions, and which lengths are 1 (to a compiler, 1 is a constant). Lengths, windows,
offsets and tables are symbols or tensors, so that a new length compiles nothing. Three more measures see to that:

- Every form has a function of its own, since a compiler gives up on a function it has compiled often enough. This one
  then raises (``fullgraph``), and it does where compilation is switched off: FlexAttention uncompiled would make whole
  ``q_len x kv_len`` grids.
- It is compiled on an example in which no two sizes are equal: a compiler takes equal sizes for the same symbol.
- What masks and biases look up is flat and goes through ``embedding``, which asks for no size: PyTorch's CPU kernels
  (seen in 2.13) take the size of a captured tensor from elsewhere if it is a symbol. Tables that are trained, which is
  on CUDA, are indexed instead: of lookups, PyTorch's backward of FlexAttention takes the gradient of that one alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attnzoo.backends.flex.block_lists import BlockIndices
from attnzoo.errors import BackendRefusedError, Refusal

_UNCOMPILED = Refusal("torch.compile", "switched off, by a stance or a setting", "on: uncompiled, it makes whole grids")


class Form(NamedTuple):
    """What a kernel's code depends on.

    Attributes:
        chunked: per segment, whether it is ``Chunks``; else it is a band: ``Full``, ``Causal`` or ``Window``.
        biased: whether a relative bias is added.
        placed: per segment, whether its bias goes by positions of the queries.
        scale: factor on the scores.
        blocks: queries and keys per block.
        dtype, device: of the tensors.
        threads: a compiled CPU kernel is for one number of threads.
        heads, kv_heads, head_dim, value_dim: a compiled kernel is for these.
        single: which are 1 of batch, q_len and keys.
        trained: which require grad of query, key, value and table; none if no backward is wanted.
    """

    chunked: tuple[bool, ...]
    biased: bool
    placed: tuple[bool, ...]
    scale: float
    blocks: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    threads: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    single: tuple[bool, ...]
    trained: tuple[bool, ...]


Numbers = tuple[Tensor, ...]  # of no dimension, long


class Terms(NamedTuple):
    """What masks and biases are computed from.

    Attributes:
        sizes: keys, entries of the table per head, queries.
        patterns: per segment the start and stop of its keys, then the pattern's own numbers: lowest and highest
            distance of a band; or length, chunks before, reach, number of chunks and 1 if causal.
        real: ``(batch * keys,)`` bool, False for padding keys.
        biases: per segment distance 0, key position of query 0, first and last entry of the table.
        table: ``(heads * entries,)`` float, the bias values of all segments side by side.
        positions: per segment the positions of its queries, ``(batch * q_len,)`` long; anything where it has none.
    """

    sizes: Numbers
    patterns: tuple[Numbers, ...]
    real: Tensor
    biases: tuple[Numbers, ...]
    table: Tensor
    positions: tuple[Tensor, ...]


Kernel = Callable[[Tensor, Tensor, Tensor, BlockIndices, Terms], Tensor]


@cache
def kernel(form: Form) -> Kernel:
    """The compiled attention of a form: query, keys and values of all segments side by side, blocks and terms.

    Query ``(batch, heads, q_len, head_dim)``, in memory ``(batch, q_len, heads, head_dim)``; keys and values contiguous
    ``(batch, kv_heads, keys, dim)``.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, indices: BlockIndices, terms: Terms) -> Tensor:
        if not torch.compiler.is_compiling():  # a constant in compiled code
            raise BackendRefusedError("flex_attention", {"attention": (_UNCOMPILED,)}, {})

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return _seen(form, terms, q, kv) & _at(terms.real, b * terms.sizes[0] + kv)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            entry = h * terms.sizes[1] + _entry(form, terms, b, q, kv)
            return score + (terms.table[entry] if form.trained[-1] else _at(terms.table, entry))

        block_mask = BlockMask.from_kv_blocks(
            *indices,
            BLOCK_SIZE=form.blocks,
            mask_mod=mask_mod,
            seq_lengths=(query.shape[2], key.shape[2]),
            compute_q_blocks=any(form.trained),
        )
        modified, scale = score_mod if form.biased else None, form.scale
        output: Tensor = flex_attention(query, key, value, modified, block_mask, scale, enable_gqa=True)
        return output

    # A code object of its own, which is what compilers keep their books by.
    code = attend.__code__.replace(co_name=f"attend_{kernel.cache_info().misses}")
    own = FunctionType(code, attend.__globals__, code.co_name, None, attend.__closure__)
    compiled = torch.compile(own, dynamic=True, fullgraph=True, options={"assert_indirect_indexing": False})
    compiled(*_example(form))
    return compiled


def _at(flat: Tensor, index: Tensor) -> Tensor:
    """An entry of a flat tensor."""
    return torch.nn.functional.embedding(index, flat[:, None]).squeeze(-1)


def _seen(form: Form, terms: Terms, q: Tensor, kv: Tensor) -> Tensor:
    """The patterns' ``mask_mod`` of all segments, with their numbers as tensors."""
    seen = None
    for number, chunked in enumerate(form.chunked):
        start, stop, *rest = terms.patterns[number]
        key = kv - start
        if chunked:
            length, before, reach, count, causal = rest
            near = (key // length - q // length + before) % count <= reach
            near = near & ((key <= q) | (causal == 0))
        else:
            near = (key - q >= rest[0]) & (key - q <= rest[1])
        near = near & (key >= 0) & (kv < stop) if len(form.chunked) > 1 else near
        seen = near if seen is None else seen | near
    return cast(Tensor, seen)


def _entry(form: Form, terms: Terms, b: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """Which entry of the table stands at a query and a key."""
    found = None
    for number, placed in enumerate(form.placed):
        zero, shift, first, last = terms.biases[number]
        start = terms.patterns[number][0]
        at = _at(terms.positions[number], b * terms.sizes[2] + q) if placed else q + shift
        entry = (kv - start - at + zero + first).clamp(first, last)
        found = entry if found is None else torch.where(kv < start, found, entry)
    return cast(Tensor, found)


def numbers(*values: int, device: torch.device) -> Numbers:
    """Tensors of their own, without a size or an offset that a kernel would be compiled for."""
    return tuple(torch.tensor(value, device=device) for value in values)


def in_rows(query: Tensor) -> Tensor:
    """Queries ``(batch, heads, q_len, head_dim)`` in the only layout kernels are compiled for.

    Compilers compile anew for what a tensor is a view of, and for strides along dimensions of one element.
    """
    rows = query.transpose(1, 2).contiguous()
    rows = rows.view(rows.shape)
    return (rows if torch.is_grad_enabled() and rows.requires_grad else rows.detach()).transpose(1, 2)


def _example(form: Form) -> tuple[Tensor, Tensor, Tensor, BlockIndices, Terms]:
    """Arguments of the form in which no two sizes are equal, but for those that are 1. No block of it is computed."""
    taken = {form.heads, form.kv_heads, form.head_dim, form.value_dim}

    def fresh(size: int) -> int:
        while size in taken:
            size += 1
        taken.add(size)
        return size

    rows, columns = fresh(3), fresh(4)
    sizes = (2, rows * form.blocks[0] - 20, columns * form.blocks[1] - 20)
    batch, q_len, keys = (1 if single else fresh(size) for size, single in zip(sizes, form.single, strict=True))

    def zeros(*shape: int, dtype: torch.dtype, trained: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=form.device, requires_grad=trained)

    def states(length: int, count: int, dim: int, trained: bool) -> Tensor:
        return zeros(batch, count, length, dim, dtype=form.dtype, trained=trained)

    *trained, table_trained = form.trained
    shapes = (
        (q_len, form.heads, form.head_dim),
        (keys, form.kv_heads, form.head_dim),
        (keys, form.kv_heads, form.value_dim),
    )
    query, key, value = (states(*shape, trained=one) for shape, one in zip(shapes, trained, strict=True))
    query = in_rows(query)
    counts, places = zeros(batch, 1, rows, dtype=torch.int32), zeros(batch, 1, rows, columns, dtype=torch.int32)
    terms = Terms(
        numbers(0, 0, 0, device=form.device),
        tuple(numbers(*[1] * 7, device=form.device) for _ in form.chunked),
        zeros(batch * keys, dtype=torch.bool),
        tuple(numbers(*[0] * 4, device=form.device) for _ in form.chunked),
        zeros(form.heads * 23, dtype=torch.float32, trained=table_trained),
        tuple(zeros(batch * q_len if placed else 17, dtype=torch.long) for placed in form.placed),
    )
    return query, key, value, BlockIndices(counts, places, counts.clone(), places.clone()), terms
