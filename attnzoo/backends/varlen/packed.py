"""Attention on kernels for packed sequences: calls, united by log-sum-exp, forward and backward.

Each call (:mod:`attnzoo.backends.varlen.calls`) gives an output and its log-sum-exp; they are united exactly
(``union``), and each call's backward gets the final output and lse. Where no query is in two calls, the
kernel's own public function runs.

Keys that have to keep their places though they are hidden get one more dimension: queries have a number there, hidden
keys a negative one such that their scaled scores are 2^22 lower than those of visible keys, which have zero. Their
weights underflow to zero exactly, forward and backward; a row that sees nothing but hidden keys is known by its lse.
More than 2^22 would do harm: kernels round what they take the exponential of, and its error would overflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnzoo.backend import Backend, Capabilities
from attnzoo.backends.common.blocks import positive_scale
from attnzoo.backends.common.union import merge_
from attnzoo.backends.varlen.calls import Call, Plan, plan
from attnzoo.backends.varlen.kernels import Inputs, Kernel, no_device
from attnzoo.backends.varlen.sorted_calls import fold_heads
from attnzoo.errors import InvalidArgumentError, Refusal
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Request, Result

_HIDDEN = 22  # hidden keys score 2^22 lower
_LARGEST = 15  # exponents of two that float16 holds

CAPABILITIES = Capabilities(
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    patterns=frozenset({Full, Causal, Window, Chunks, SortedChunks}),
    segments=1 << 16,
    key_mask=True,
    gqa=True,
    uneven_value_dim=True,
    grad=True,
)


@dataclass(frozen=True)
class PackedBackend(Backend):
    """A backend of such kernels.

    Options:
        kernel: the name of the kernel to use; None: the first that takes the request.

    Class attributes:
        kernels: what there is to choose from, best first.
    """

    kernel: str | None = None
    kernels: ClassVar[tuple[type[Kernel], ...]] = ()

    def __post_init__(self) -> None:
        names = [kernel.name for kernel in self.kernels]
        if self.kernel is not None and self.kernel not in names:
            raise InvalidArgumentError("kernel", repr(self.kernel), f"None, or one of {names}")

    @classmethod
    def unavailable(cls) -> str | None:
        reasons = [kernel.unavailable() for kernel in cls.kernels]
        missing = reasons if all(reason is not None for reason in reasons) else []
        return "; ".join(dict.fromkeys(reason for reason in (no_device(), *missing) if reason is not None)) or None

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        return self._told(request, self._choose(request)[1])

    def refusals_anywhere(self, request: Request) -> tuple[Refusal, ...]:
        named = (kernel for kernel in self.kernels if self.kernel in (None, kernel.name))
        return self._told(request, min((kernel.refusals(request) for kernel in named), key=len))

    def _told(self, request: Request, chosen: tuple[Refusal, ...]) -> tuple[Refusal, ...]:
        """Refusals of the backend, and of its kernel where they say something else."""
        own = [
            replace(reason, allowed=f"{reason.allowed}, or torch.autocast to one of them")
            if reason.field == "dtype" and request.dtype == torch.float32
            else reason
            for reason in super().refusals(request)
        ]
        told = {reason.field for reason in own}
        return (*own, *(reason for reason in chosen if reason.field not in told))

    def _choose(self, request: Request) -> tuple[type[Kernel], tuple[Refusal, ...]]:
        """The first kernel that takes a request; where none does, one of them and its refusals."""
        named = [kernel for kernel in self.kernels if self.kernel in (None, kernel.name)]
        usable = [kernel for kernel in named if kernel.unavailable() is None]
        if not usable and self.kernel is not None:
            return named[0], (Refusal("kernel", f"{self.kernel!r}: {named[0].unavailable()}", "kernel=None"),)
        verdicts = [(kernel, (*kernel.refusals(request), *kernel.lacking(request))) for kernel in usable or named]
        return next((verdict for verdict in verdicts if not verdict[1]), verdicts[0])

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        return attend(attention, self._choose(attention.request())[0])


def attend(attention: Attention, kernel: type[Kernel]) -> Result:
    """An attention without bias and dense mask on a kernel; on none if no query sees a key."""
    whole, attention = attention, positive_scale(attention)
    if any(isinstance(segment.pattern, SortedChunks) for segment in attention.segments):
        attention = fold_heads(attention)
    planned = plan(attention, kernel.windows)
    hiding = planned.spare or any(mask is not None for mask in planned.hidden)
    packed = _Packing(attention, planned, _Hiding(attention.scale) if hiding else None)
    settings = _Settings(kernel, planned, packed.places, attention.scale, attention.dropout)
    if len(attention.segments) == 1 and planned.calls and not hiding:
        output, live = packed.attend(settings)
    else:
        output, lse = _Union.apply(settings, packed.query, *packed.keys_values)
        live = packed.live(lse)
    output = output[: attention.batch * attention.q_len, :, : attention.value_dim]
    output = output.unflatten(0, (attention.batch, attention.q_len)).transpose(1, 2)
    if live is not None:
        live = live.reshape(whole.batch, -1, whole.q_len)
    output = whole.fill(output.reshape(whole.batch, whole.heads, whole.q_len, whole.value_dim), live)
    return Result(output, kernel.name if planned.calls else "none")


class _Hiding:
    """The numbers in the extra dimension: powers of two, so that nothing is rounded."""

    def __init__(self, scale: float) -> None:
        exponent = min(math.ceil(_HIDDEN - math.log2(scale)), 2 * _LARGEST)
        self.depth = scale * 2.0**exponent
        if self.depth < 2.0 ** (_HIDDEN / 2):
            raise InvalidArgumentError("scale", scale, f"at least 2**{_HIDDEN // 2 - 2 * _LARGEST}, to hide keys by")
        self.query = 2.0 ** min(exponent - exponent // 2, _LARGEST)
        self.key = -(2.0**exponent) / self.query


class _Packing:
    """Queries, keys and values as kernels want them, ``(rows, heads, dim)``; each distinct tensor once.

    Attributes:
        query: ``(batch * q_len, heads, dim)``, and the spare row if there is one.
        keys_values: ``(batch * kv_len, kv_heads, dim)`` each, likewise.
        places: which of them the segments' are: key, value, key, ...
    """

    def __init__(self, attention: Attention, planned: Plan, hiding: _Hiding | None) -> None:
        self._attention, self._planned, self._hiding = attention, planned, hiding
        dim = max(attention.head_dim + (hiding is not None), attention.value_dim)
        self._dim = -(-dim // 8) * 8
        rows = attention.query.new_full((attention.batch, attention.q_len), 0.0 if hiding is None else hiding.query)
        self.query = self._pack(attention.query, rows, 0.0)
        self.keys_values: list[Tensor] = []
        self.places: list[int] = []
        known: dict[tuple[object, ...], int] = {}
        for segment, hidden in zip(attention.segments, planned.hidden, strict=True):
            key_name = ("key", id(segment.key), None if hidden is None else id(segment.key_mask))
            if key_name not in known:
                known[key_name] = len(self.keys_values)
                self.keys_values.append(self._pack_key(segment.key, hidden))
            value_name = ("value", id(segment.value))
            if value_name not in known:
                known[value_name] = len(self.keys_values)
                self.keys_values.append(self._pack(segment.value, None, 0.0))
            self.places += [known[key_name], known[value_name]]

    def _pack_key(self, key: Tensor, hidden: Tensor | None) -> Tensor:
        if self._hiding is None:
            return self._pack(key, None, 0.0)
        numbers = key.new_zeros((key.shape[0], key.shape[2]))
        if hidden is not None:
            numbers = numbers.masked_fill(hidden, self._hiding.key)
        return self._pack(key, numbers, self._hiding.key)

    def _pack(self, tensor: Tensor, numbers: Tensor | None, spare: float) -> Tensor:
        """``(batch, heads, n, d)`` as ``(batch * n, heads, dim)``, ``numbers`` ``(batch, n)`` in the extra dimension.

        The spare row is zero, but for a number of its own: as a query it scores all keys zero and its output is
        dropped, so that its gradients are zero; as a key it is hidden.
        """
        rows = tensor.transpose(1, 2).flatten(0, 1)
        room = self._dim - rows.shape[2]
        if room:
            extra = rows.new_zeros((*rows.shape[:2], room))
            if numbers is not None:
                extra[..., 0] = numbers.flatten()[:, None]
            rows = torch.cat([rows, extra], dim=2)
        if self._planned.spare:
            last = rows.new_zeros((1, *rows.shape[1:]))
            last[..., tensor.shape[3] : tensor.shape[3] + 1] = spare
            rows = torch.cat([rows, last])
        return rows if _is_aligned(rows) else rows.clone(memory_format=torch.contiguous_format)

    def attend(self, settings: _Settings) -> tuple[Tensor, Tensor | None]:
        """The output of a single segment ``(rows, heads, dim)``, and which rows see a key, ``(batch, 1, q_len)``.

        Without hidden keys no query is in two calls (:func:`calls.disjoint`): there is nothing to unite.
        """
        attention, calls = self._attention, self._planned.calls
        outputs = [settings.kernel.attend(settings.inputs(call, self.query, self.keys_values)) for call in calls]
        rows = [call.q_rows for call in calls if call.q_rows is not None]
        if not rows:
            return outputs[0], None
        index = torch.cat(rows)
        seen = torch.zeros(self.query.shape[0], dtype=torch.bool, device=index.device).index_fill(0, index, True)
        whole = outputs[0].new_zeros(self.query.shape).index_copy(0, index, torch.cat(outputs))
        return whole, seen.view(attention.batch, 1, attention.q_len)

    def live(self, lse: Tensor) -> Tensor:
        """Which rows see a key, ``(batch, heads, q_len)``, from the union's ``(heads, rows)``."""
        attention = self._attention
        floor = -math.inf if self._hiding is None else -self._hiding.depth / 2
        rows = lse[:, : attention.batch * attention.q_len] > floor
        return rows.unflatten(1, (attention.batch, attention.q_len)).transpose(0, 1)


def _is_aligned(rows: Tensor) -> bool:
    """Whether a kernel can load the rows as they lie in memory, 16 bytes at a time."""
    *outer, inner = rows.stride()
    return inner == 1 and all(step % 8 == 0 for step in (*outer, rows.storage_offset()))


def _rows(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


class _Settings(NamedTuple):
    """What a union needs beside its tensors."""

    kernel: type[Kernel]
    planned: Plan
    places: list[int]
    scale: float
    dropout: float

    def inputs(self, call: Call, query: Tensor, keys_values: Sequence[Tensor]) -> Inputs:
        """What the kernel gets for one call."""
        key, value = (
            _rows(keys_values[place], call.k_rows) for place in self.places[2 * call.segment : 2 * call.segment + 2]
        )
        return Inputs(_rows(query, call.q_rows), key, value, call.sequences, self.scale, self.dropout)


class _Union(torch.autograd.Function):
    """Calls united by log-sum-exp, forward and backward."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, query: Tensor, *keys_values: Tensor) -> tuple[Tensor, Tensor]:
        out = query.new_zeros(query.shape, dtype=torch.float32)
        lse = query.new_full((query.shape[1], query.shape[0]), -math.inf, dtype=torch.float32)
        states = []
        for call in settings.planned.calls:
            part_out, part_lse, state = settings.kernel.forward(settings.inputs(call, query, keys_values))
            _unite_(out, lse, call.q_rows, part_out, part_lse)
            states.append(state)
        out = out.to(query.dtype)
        ctx.settings, ctx.states = settings, states
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(query, *keys_values, out, lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        query, *keys_values, out, lse = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grads = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (query, *keys_values)]
        for call, state in zip(settings.planned.calls, ctx.states, strict=True):
            part_lse = lse if call.q_rows is None else lse.index_select(1, call.q_rows)
            results = _rows(grad_out, call.q_rows), _rows(out, call.q_rows), part_lse.contiguous()
            parts = settings.kernel.backward(settings.inputs(call, query, keys_values), *results, state)
            key, value = (grads[place + 1] for place in settings.places[2 * call.segment : 2 * call.segment + 2])
            for grad, index, part in zip(
                (grads[0], key, value), (call.q_rows, call.k_rows, call.k_rows), parts, strict=True
            ):
                if index is None:
                    grad += part
                else:
                    grad.index_add_(0, index, part.float())
        return None, *(grad.to(query.dtype) for grad in grads)


def _unite_(out: Tensor, lse: Tensor, rows: Tensor | None, part_out: Tensor, part_lse: Tensor) -> None:
    """Unite a call's ``(rows, heads, dim)`` and ``(heads, rows)`` into the whole, in place."""
    if rows is None:
        merge_(out.transpose(0, 1), lse, part_out.transpose(0, 1), part_lse)
        return
    some_out, some_lse = out.index_select(0, rows), lse.index_select(1, rows)
    merge_(some_out.transpose(0, 1), some_lse, part_out.transpose(0, 1), part_lse)
    out.index_copy_(0, rows, some_out)
    lse.index_copy_(1, rows, some_lse)
