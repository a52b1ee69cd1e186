"""Attention in blocks, forward and backward, by the CPU kernel of FlashAttention in PyTorch.

A kernel call returns ``(out, lse)`` for a block of queries and one part of this block. In the forward, a call may
compute several blocks with equal masks (:mod:`attnzoo.backends.sdpa.stacks`). :mod:`attnzoo.backends.common.union`
merges the results of all parts. The forward saves the inputs, the output and lse for the backward.

No public function returns the ``lse`` of PyTorch's CPU kernel, so this module calls two private operators of PyTorch.
:func:`unavailable` checks the signatures of these operators. Without the operators the ``sdpa`` backend makes slower
public calls. ``tests/backends/test_flash_cpu.py`` tests the behaviour of the operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from attnzoo.backends.common.blocks import Block, block_size, blocks, passes
from attnzoo.backends.common.union import Grads, PartialKernel, unite
from attnzoo.backends.sdpa.grouped_stacks import GroupedStack, grouped_stacks, other_queries
from attnzoo.backends.sdpa.part_masks import PartMasks
from attnzoo.backends.sdpa.sorted_stacks import SortedStack, sorted_stacks
from attnzoo.backends.sdpa.stacks import Scratch, Stack, stacks
from attnzoo.backends.sdpa.trained_bias import BiasGradients, backward_by_hand, trained_biases
from attnzoo.spec.patterns import SortedChunks
from attnzoo.spec.segments import Attention

KERNEL = "flash_cpu"
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
_operators = torch.ops.aten
# The same operator as a function that reads its arguments 3 us faster. A decoding step of a site takes only tens of us.
_operator: Any = getattr(torch, _FORWARD, None) or getattr(_operators, _FORWARD, None)
_Rows = Stack | SortedStack | GroupedStack


@cache
def unavailable() -> str | None:
    """Return which private operator this PyTorch version lacks or has changed, or None if both can be used."""
    inputs, settings = ("query", "key", "value"), ("dropout_p", "is_causal", "attn_mask", "scale")
    expected = {_FORWARD: (*inputs, *settings), _BACKWARD: ("grad_out", *inputs, "out", "logsumexp", *settings)}
    for name, arguments in expected.items():
        op = getattr(_operators, name, None)
        if op is None:
            return f"torch {torch.__version__} has no aten::{name}"
        if tuple(argument.name for argument in op.default._schema.arguments) != arguments:
            return f"torch {torch.__version__} changed the arguments of aten::{name}"
    return None


def call(query: Tensor, key: Tensor, value: Tensor, terms: Mapping[str, Any]) -> Tensor:
    """Return the output of one kernel call. ``terms`` are keywords of the public ``scaled_dot_product_attention``.

    The operator raises for dropout. The mask must be additive, ``(batch or 1, heads or 1, q_len, kv_len)``.
    """
    output: Tensor = _operator(query, key, value, **terms)[0]
    return output


def attend(attention: Attention) -> Tensor:
    """Return the output of an attention with CPU tensors, ``value_dim == head_dim`` and no dropout."""
    trained = [bias.values for bias in trained_biases(attention).values()] if torch.is_grad_enabled() else []
    keys_values, places = _distinct_tensors(attention)
    kernel = partial(_CpuKernel, _without_storage(attention), places)
    output, lse = unite(kernel, attention.query, [*keys_values, *trained], _mask_tensors(attention))
    visible_rows = lse != float("-inf")
    return attention.fill(output, None if bool(visible_rows.all()) else visible_rows)


def _distinct_tensors(attention: Attention) -> tuple[list[Tensor], list[int]]:
    """Return the distinct key and value tensors, and the index of each segment's key and value among them.

    The indices are in the order of :attr:`PartialKernel.places`.
    """
    every = [tensor for segment in attention.segments for tensor in (segment.key, segment.value)]
    distinct = list({id(tensor): tensor for tensor in every}.values())
    numbers = {id(tensor): number for number, tensor in enumerate(distinct)}
    return distinct, [numbers[id(tensor)] for tensor in every]


def _without_storage(attention: Attention) -> Attention:
    """Return a copy whose query, keys and values have a shape but no data. The autograd graph keeps the data."""

    def shell(tensor: Tensor) -> Tensor:
        return tensor.detach().new_empty(()).expand(tensor.shape)

    shells = tuple(
        replace(segment, key=shell(segment.key), value=shell(segment.value)) for segment in attention.segments
    )
    return replace(attention, query=shell(attention.query), segments=shells, query_mask=None, empty=None)


def _mask_tensors(attention: Attention) -> list[Tensor]:
    """Return the tensors of masks and biases that the backward reads again."""
    values: list[object] = []
    for segment in attention.segments:
        values += [segment.key_mask, segment.mask]
        if segment.bias is not None:
            values += vars(segment.bias).values()
    # Inference tensors cannot be saved for the backward. This is safe, because only inference mode can write to them.
    return [value for value in values if isinstance(value, Tensor) and not value.is_inference()]


class _CpuKernel(PartialKernel):
    """PyTorch's CPU kernel as a :class:`PartialKernel`. It consists of two private operators.

    The forward calls the first operator once per part of a stack. The backward calls the second operator once per part
    of a block.
    """

    def __init__(self, attention: Attention, places: list[int], query: Tensor, tensors: Sequence[Tensor]) -> None:
        self._attention, self.places, self.query, self.tensors = attention, places, query, tensors
        self._masks, self._scratch = PartMasks(attention), (Scratch(), Scratch())
        self._passes = passes(attention)
        self._bias_gradients: BiasGradients  # created for the backward

    def new_results(self) -> tuple[Tensor, Tensor]:
        batch, heads, q_len, dim = self.query.shape
        accumulate = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        dtype = self.query.dtype if len(self._forward_passes) == 1 else accumulate
        if any(map(self._is_sorted, self._passes)):  # rows are used in any order, so keep the rows of a head together
            out = self.query.new_empty((batch, heads, q_len, dim), dtype=dtype)
            return out, self.query.new_full((batch, heads, q_len), float("-inf"), dtype=accumulate)
        # Models need the memory layout (batch, q_len, heads, dim).
        out = self.query.new_empty((batch, q_len, heads, dim), dtype=dtype)
        lse = self.query.new_full((batch, q_len, heads), float("-inf"), dtype=accumulate)
        return out.transpose(1, 2), lse.transpose(1, 2)

    def _is_sorted(self, segments: list[int]) -> bool:
        return isinstance(self._attention.segments[segments[0]].pattern, SortedChunks)

    @cached_property
    def _grouped(self) -> dict[int, list[GroupedStack]]:
        """The stacks of the segments whose queries can be grouped, by segment. These segments have separate passes."""
        every = ((index, grouped_stacks(self._attention, index)) for index in range(len(self._attention.segments)))
        return {index: grouped for index, grouped in every if grouped}

    @cached_property
    def _forward_passes(self) -> list[list[int]]:
        """The passes of the forward. The backward needs larger passes, because some gradients need whole softmaxes."""
        rest = [[index for index in segments if index not in self._grouped] for segments in self._passes]
        return [*filter(None, rest), *([index] for index in self._grouped)]

    def forward_plan(self) -> Iterator[tuple[bool, _Rows]]:
        if any(map(self._is_sorted, self._passes)):
            self.query = self.query.contiguous()
        for number, segments in enumerate(self._forward_passes):
            yield from ((number == 0, rows) for rows in self._rows_of(segments))

    def _rows_of(self, segments: list[int]) -> Iterator[_Rows]:
        """Yield the rows of one pass of the forward."""
        attention = self._attention
        if self._is_sorted(segments):
            yield from sorted_stacks(attention, segments[0])
        elif segments[0] in self._grouped:
            grouped = self._grouped[segments[0]]
            yield from grouped
            yield from other_queries(attention, segments[0], grouped)
        else:
            for stack in stacks(attention, segments):
                yield from stack.by_sample(attention.batch)

    def forward(self, rows: _Rows, number: int) -> tuple[Tensor, Tensor]:
        """Return out and lse of part ``number`` in the shapes that ``rows.take`` returns."""
        part = rows.parts[number]
        mask, visible_rows = rows.mask(self._masks, number)
        call = rows.flat() if isinstance(rows, Stack) and mask is None and rows.steps[number] == 0 else rows
        key, value = (
            call.keys(number, tensor, self._attention.heads, scratch)
            for tensor, scratch in zip(self.keys_values(part.segment), self._scratch, strict=True)
        )
        out, lse = getattr(_operators, _FORWARD)(
            *(call.take(self.query), key, value, 0.0, False), attn_mask=mask, scale=self._attention.scale
        )
        if isinstance(rows, Stack) and call is not rows:
            out, lse = rows.by_block(out), rows.by_block(lse)
        if visible_rows is not None:  # the kernel returns lse 0 for a row that sees no key; the true lse is -inf
            lse = lse.masked_fill(~visible_rows, float("-inf"))
        return out, lse

    def backward_plan(self) -> Iterator[tuple[bool, Block]]:
        self._bias_gradients = BiasGradients(self._attention)
        for number, segments in enumerate(self._passes):
            for block in blocks(self._attention, segments, block_size(self._attention)):
                yield number == 0, block

    def backward(self, rows: Block, grad_out: Tensor, out: Tensor, lse: Tensor) -> list[Grads]:
        query, scale, heads = rows.take(self.query), self._attention.scale, self._attention.heads
        pairs = [[part.take(tensor, heads) for tensor in self.keys_values(part.segment)] for part in rows.parts]
        if any(part.segment in self._bias_gradients for part in rows.parts):
            masks = [self._masks.of(rows, part)[0] for part in rows.parts]
            is_whole = len(self._passes) == 1
            by_hand = backward_by_hand((grad_out, query, out, lse), pairs, masks, scale, is_whole)
            for part, (*_, grad_scores) in zip(rows.parts, by_hand, strict=True):
                if part.segment in self._bias_gradients:
                    self._bias_gradients.add(rows, part, grad_scores)
            return [grads[:3] for grads in by_hand]
        return [
            getattr(_operators, _BACKWARD)(
                *(grad_out, query, key, value, out, lse, 0.0, False),
                attn_mask=self._masks.of(rows, part)[0],
                scale=scale,
            )
            for part, (key, value) in zip(rows.parts, pairs, strict=True)
        ]

    def further_gradients(self) -> list[Tensor]:
        return self._bias_gradients.finished()
