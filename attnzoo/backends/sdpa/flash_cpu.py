"""Blocked union attention on PyTorch's CPU FlashAttention kernel, forward and backward.

Each block of queries attends to each of its parts with the kernel, which returns ``(out, lse)``; parts are united by
log-sum-exp (``union``). Parts are views of keys and values; of blocks that look alike, which read the same
keys many times, the rows are laid side by side first (:mod:`attnzoo.backends.sdpa.stacks`).
Saved for the backward are the inputs, the output and ``lse``; each part's backward gets the final out and lse.

The kernel behind ``scaled_dot_product_attention`` on the CPU does not hand out its ``lse`` through a public function,
so two private operators of PyTorch are called. :func:`unavailable` guards for their signatures; the sdpa backend
then takes its slower public path. ``tests/backends/test_flash_cpu.py`` pins their behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnzoo.backends.common.blocks import Block, Masks, Part, additive, block_size, blocks, passes
from attnzoo.backends.common.hash_terms import HashTerms
from attnzoo.backends.common.tokens import TokenTerms
from attnzoo.backends.common.union import merge_
from attnzoo.backends.sdpa.stacks import Scratch, Stack, stacks
from attnzoo.spec.bias import Bias
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import SortedChunks
from attnzoo.spec.segments import Attention

KERNEL = "flash_cpu"
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
_operators = torch.ops.aten


@cache
def unavailable() -> str | None:
    """Why the private operators cannot be used with this PyTorch, or None."""
    expected = {
        _FORWARD: ["query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"],
        _BACKWARD: [
            *("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal", "attn_mask", "scale")
        ],
    }
    for name, arguments in expected.items():
        op = getattr(_operators, name, None)
        if op is None:
            return f"torch {torch.__version__} has no aten::{name}"
        if [argument.name for argument in op.default._schema.arguments] != arguments:
            return f"torch {torch.__version__} changed the arguments of aten::{name}"
    return None


def attend(attention: Attention) -> Tensor:
    """The attention's output ``(batch, heads, q_len, value_dim)``.

    For CPU tensors with ``value_dim == head_dim`` and without dropout.
    """
    trained = [bias.values for bias in _trained(attention).values()] if torch.is_grad_enabled() else []
    tensors, places = _keys_values(attention)
    output, live = _Blocked.apply(_hollow(attention), places, len(trained), attention.query, *tensors, *trained)
    return attention.fill(output, None if bool(live.all()) else live)


def _keys_values(attention: Attention) -> tuple[list[Tensor], list[int]]:
    """Keys and values of all segments, each tensor once, and which of them the segments' are: key, value, key, ..."""
    every = [tensor for segment in attention.segments for tensor in (segment.key, segment.value)]
    once = list({id(tensor): tensor for tensor in every}.values())
    numbers = {id(tensor): number for number, tensor in enumerate(once)}
    return once, [numbers[id(tensor)] for tensor in every]


def _trained(attention: Attention) -> dict[int, Bias]:
    """The biases that get a gradient, by number of their segment."""
    return {
        index: segment.bias
        for index, segment in enumerate(attention.segments)
        if segment.bias is not None and segment.bias.values.requires_grad
    }


def _hollow(attention: Attention) -> Attention:
    """The attention on tensors of the same shapes without storage, so that the graph does not hold them twice."""

    def shell(tensor: Tensor) -> Tensor:
        return tensor.detach().new_empty(()).expand(tensor.shape)

    segments = tuple(
        replace(
            segment,
            key=shell(segment.key),
            value=shell(segment.value),
        )
        for segment in attention.segments
    )
    return replace(attention, query=shell(attention.query), segments=segments, query_mask=None, empty=None)


def _read_again(attention: Attention) -> list[Tensor]:
    """Masks and biases, which the backward makes its terms from: PyTorch raises if saved tensors were written to."""
    found: list[object] = []
    for segment in attention.segments:
        found += [segment.key_mask, segment.mask]
        if segment.bias is not None:
            found += vars(segment.bias).values()
    # Inference tensors cannot be saved, and are written to in inference mode alone.
    return [one for one in found if isinstance(one, Tensor) and not one.is_inference()]


class _Terms:
    """What the kernel adds to a part's scores, and the part's live rows; the last of each segment is reused."""

    def __init__(self, attention: Attention) -> None:
        self._masks, self._attention = Masks(attention), attention
        self._last: dict[int, tuple[object, Tensor | None, Tensor | None]] = {}
        self._tokens: dict[tuple[int, bool], TokenTerms] = {}
        self._hashed: dict[int, HashTerms] = {}

    def of(self, block: Block, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """The additive term ``(batch, heads, n, m)`` and the live rows ``(batch, heads, n)``; None: nothing to say."""
        attention = self._attention
        term, live = self._of_structure(block, part)
        keys = self._masks.of_keys(block, part)
        if keys is not None:
            pattern = self._masks.of_pattern(block, part)
            live = (keys if pattern is None else keys & pattern.seen).any(-1)
            term = additive(keys, term, attention.query.dtype)
        shape = (attention.batch, attention.heads, block.q_stop - block.q_start, part.kv_stop - part.kv_start)
        return (None if term is None else term.expand(shape)), (None if live is None else live.expand(shape[:3]))

    def _of_structure(self, block: Block, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """Pattern and bias alone: the same for most blocks of a sequence."""
        segment = self._attention.segments[part.segment]
        if isinstance(segment.pattern, SortedChunks) and segment.bias is None and block.queries is not None:
            token = segment.pattern.sorted_tensors()[1]  # one tensor for all rounds, as a rule
            known = (id(token), segment.pattern.causal)
            if known not in self._tokens:
                self._tokens[known] = TokenTerms(token, segment.pattern.causal, self._attention.query.dtype)
            return self._tokens[known].of(block.queries, part.kv_start, part.kv_stop)
        if isinstance(segment.pattern, HashedChunks) and block.queries is not None and part.keys is not None:
            if part.segment not in self._hashed:
                lengths = (self._attention.q_len, segment.kv_len)
                self._hashed[part.segment] = HashTerms(segment.pattern, *lengths, self._attention.query.dtype)
            return self._hashed[part.segment].of(block.queries, part.keys)
        key, last = self._masks.key(block, part), self._last.get(part.segment)
        if key is not None and last is not None and last[0] == key:
            return last[1:]
        mask, bias = self._masks.of_pattern(block, part), self._masks.bias(block, part)
        term = additive(None if mask is None else mask.seen, bias, self._attention.query.dtype)
        live = None if mask is None else mask.live
        if key is not None:
            self._last[part.segment] = (key, term, live)
        return term, live


class _Calls:
    """The kernel on keys and values of an attention's parts."""

    def __init__(self, attention: Attention, places: list[int], keys_values: Sequence[Tensor]) -> None:
        self._attention, self._places, self._keys_values = attention, places, keys_values
        self._terms, self._scratch = _Terms(attention), (Scratch(), Scratch())

    def forward(self, stack: Stack, number: int, sample: slice, query: Tensor) -> tuple[Tensor, Tensor]:
        """Out ``(samples, heads, rows, dim)`` and lse ``(samples, heads, rows)`` of a stack's queries at one part.

        Or, of more than one block, ``(heads, depth, rows, dim)`` and ``(heads, depth, rows)``.
        """
        part = stack.block.parts[number]
        term, live = self._terms.of(stack.block, part)
        call = stack.flat() if term is None and stack.steps[number] == 0 else stack
        key, value = (
            call.keys(number, self._keys_values[place][sample], self._attention.heads, scratch)
            for place, scratch in zip(self._places[2 * part.segment :][:2], self._scratch, strict=True)
        )
        out, lse = getattr(_operators, _FORWARD)(
            *(call.queries(query[sample]), key, value, 0.0, False),
            attn_mask=None if term is None else call.repeat(term[sample]),
            scale=self._attention.scale,
        )
        if call is not stack:
            out, lse = stack.pile(out), stack.pile(lse)
        if live is not None:  # the kernel returns lse 0 for a row that sees nothing; its true lse is -inf
            lse = lse.masked_fill(~stack.repeat(live[sample]), float("-inf"))
        return out, lse


class _Blocked(torch.autograd.Function):
    """Forward over passes, blocks and parts; backward over the same."""

    @staticmethod
    def forward(
        ctx: Any, attention: Attention, places: list[int], biases: int, query: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        keys_values = tensors[: len(tensors) - biases]
        batch, heads, q_len, dim = query.shape
        accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
        groups = passes(attention)
        out = query.new_empty((batch, q_len, heads, dim), dtype=query.dtype if len(groups) == 1 else accumulate)
        out = out.transpose(1, 2)  # (batch, q_len, heads, dim) in memory, as models want it
        lse = query.new_full((batch, q_len, heads), float("-inf"), dtype=accumulate).transpose(1, 2)
        calls = _Calls(attention, places, keys_values)
        for number, group in enumerate(groups):
            for stack in stacks(attention, group):
                for sample in stack.samples(batch):
                    so_far = (stack.queries(out[sample]), stack.queries(lse[sample])) if number else None
                    for part in range(len(stack.block.parts)):
                        found = calls.forward(stack, part, sample, query)
                        if so_far is None:
                            so_far = found if len(stack.block.parts) == 1 else (found[0].to(accumulate), found[1])
                        else:
                            merge_(*so_far, *found)
                    if so_far is None:  # the first pass, and nothing to see
                        stack.put(out[sample], torch.zeros_like(stack.queries(query[sample])))
                    else:
                        stack.put(out[sample], so_far[0])
                        stack.put(lse[sample], so_far[1])
        out, live = out.to(query.dtype), lse != float("-inf")
        ctx.attention, ctx.places, ctx.biases = attention, places, biases
        ctx.mark_non_differentiable(live)
        ctx.save_for_backward(query, *keys_values, out, lse, *_read_again(attention))
        return out, live

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):  # the caller of backward() may be in one
            return _backward(ctx, grad_out.contiguous() if grad_out.stride(-1) != 1 else grad_out)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    attention: Attention = ctx.attention
    query, *keys_values, out, lse = ctx.saved_tensors[: 4 + max(ctx.places)]
    # Rows that see nothing have lse -inf, and the kernel would form inf - inf; with 0 their weights become 0.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    # In memory as their tensors are: projections are merged there, and a gradient that is need not be copied to be.
    grads = [torch.zeros_like(tensor, dtype=lse.dtype) for tensor in keys_values]
    groups = passes(attention)
    once = len(groups) == 1  # the blocks of one pass need no zeros to add to
    grad_query = torch.empty_like(query, dtype=lse.dtype) if once else torch.zeros_like(query, dtype=lse.dtype)
    trained = _BiasGradients(attention) if ctx.biases else None
    terms = _Terms(attention)
    for group in groups:
        for block in blocks(attention, group, block_size(attention)):
            rows = [block.take(tensor) for tensor in (grad_out, query, out, lse)]
            pairs = [_part(keys_values, ctx.places, part, attention.heads) for part in block.parts]
            if trained is not None and any(part.segment in trained for part in block.parts):
                shown = [terms.of(block, part)[0] for part in block.parts]
                grad_parts = _backward_by_hand(rows, pairs, shown, attention.scale, whole=once)
                for part, (*_, grad_scores) in zip(block.parts, grad_parts, strict=True):
                    if part.segment in trained:
                        trained.add(block, part, grad_scores)
            else:
                grad_parts = [
                    getattr(_operators, _BACKWARD)(
                        *(rows[0], rows[1], key, value, rows[2], rows[3], 0.0, False),
                        attn_mask=terms.of(block, part)[0],
                        scale=attention.scale,
                    )
                    for part, (key, value) in zip(block.parts, pairs, strict=True)
                ]
            write = block.put if once else block.add
            if not block.parts:
                write(grad_query, torch.zeros_like(rows[1]))
            for part, (grad_q, grad_k, grad_v, *_) in zip(block.parts, grad_parts, strict=True):
                write(grad_query, grad_q)
                write = block.add
                for place, grad in zip(ctx.places[2 * part.segment :], (grad_k, grad_v), strict=False):
                    part.add(grads[place], grad)
    of_biases = trained.finished() if trained is not None else []
    return None, None, None, *(grad.to(query.dtype) for grad in (grad_query, *grads)), *of_biases


def _backward_by_hand(
    rows: list[Tensor], pairs: list[tuple[Tensor, Tensor]], terms: list[Tensor | None], scale: float, whole: bool
) -> list[tuple[Tensor, ...]]:
    """Gradients of queries, keys, values and scores of each part: the kernel keeps the last to itself.

    Where the parts are the ``whole`` of what the rows see, the softmax is taken again over all of them, so that the
    gradients of a row's scores add up to zero as exactly as plain operations make them. A bias adds up many rows; with
    the kernel's rounded out and lse, roundings would add up too. What other passes see is known by out and lse alone.
    """
    wide = rows[3].dtype
    grad_out, query = (tensor.to(wide) for tensor in rows[:2])
    keys, values = ([pair[index].to(wide) for pair in pairs] for index in (0, 1))
    scores = [query @ key.transpose(-1, -2) * scale for key in keys]
    shown = [score if term is None else score + term for score, term in zip(scores, terms, strict=True)]
    joined = torch.cat(shown, dim=-1)
    grad_weights = torch.cat([grad_out @ value.transpose(-1, -2) for value in values], dim=-1)
    if whole:
        # A row that sees nothing has only -inf: its weights become 0 over something, not 0 over 0.
        joined = torch.exp(joined - joined.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min))
        weights = joined / joined.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        mean = (weights * grad_weights).sum(-1, keepdim=True)
    else:
        weights = torch.exp(joined - rows[3][..., None])
        mean = (grad_out * rows[2]).sum(-1, keepdim=True)
    grad_scores = weights * (grad_weights - mean)
    lengths = [key.shape[2] for key in keys]
    split = zip(weights.split(lengths, -1), grad_scores.split(lengths, -1), keys, strict=True)
    return [
        (grad @ key * scale, grad.transpose(-1, -2) @ query * scale, weight.transpose(-1, -2) @ grad_out, grad)
        for weight, grad, key in split
    ]


class _BiasGradients:
    """Gradients of trained biases. Blocks that look the same are added up before they are taken apart by index."""

    def __init__(self, attention: Attention) -> None:
        self._attention, self._masks, self._biases = attention, Masks(attention), _trained(attention)
        # One value may collect all scores, whose gradients add up to zero by rows: float32 would keep their roundings.
        shapes = {index: bias.values.shape for index, bias in self._biases.items()}
        self._grads = {i: torch.zeros(shape, dtype=torch.float64, device="cpu") for i, shape in shapes.items()}
        self._sums: dict[int, tuple[object, Block, Part, Tensor]] = {}

    def __contains__(self, segment: int) -> bool:
        return segment in self._biases

    def add(self, block: Block, part: Part, grad_scores: Tensor) -> None:
        """Take the gradient of a part's scores in."""
        key, known = self._masks.key(block, part), self._sums.get(part.segment)
        if known is not None and key is not None and known[0] == key:
            known[3].add_(grad_scores)
            return
        self._flush(part.segment)
        self._sums[part.segment] = (key, block, part, grad_scores.double())

    def finished(self) -> list[Tensor]:
        """The gradients, in the order of the segments and the dtype of the values."""
        for segment in self._biases:
            self._flush(segment)
        return [grad.to(self._biases[index].values.dtype) for index, grad in self._grads.items()]

    def _flush(self, index: int) -> None:
        if index not in self._sums:
            return
        _, block, part, total = self._sums.pop(index)
        q, kv = (torch.arange(*ends, device="cpu") for ends in (block[:2], part[1:3]))
        lengths = (self._attention.q_len, self._attention.segments[index].kv_len)
        self._biases[index].add_gradient_(self._grads[index], total, q, kv, *lengths)


def _part(keys_values: Sequence[Tensor], places: list[int], part: Part, heads: int) -> tuple[Tensor, Tensor]:
    key, value = (keys_values[place] for place in places[2 * part.segment : 2 * part.segment + 2])
    return part.take(key, heads), part.take(value, heads)
