"""Attention by kernels for packed sequences, forward and backward.

Each kernel call (:mod:`attnzoo.backends.varlen.calls`) returns an output and a log-sum-exp.
:mod:`attnzoo.backends.common.union` merges the results of the calls. If there is nothing to merge and no key to hide,
this module calls the public kernel function instead.

Some hidden keys must stay in a sequence, because other keys must keep their positions. To hide them, this module adds
one component to each query vector and key vector. This *hiding component* is positive in queries, negative in hidden
keys and 0 in visible keys. It lowers the scaled scores of hidden keys by 2^22, so their softmax weights underflow to
exactly 0, forward and backward. If a query sees only hidden keys, its lse is far lower than any usual lse. So the lse
shows which queries see no key. With a number larger than 2^22, the softmax weights of such queries would overflow,
because kernels round the argument of the exponential.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnzoo.backend import Backend, Capabilities
from attnzoo.backends.common.blocks import positive_scale
from attnzoo.backends.common.union import Grads, PartialKernel, unite
from attnzoo.backends.varlen.calls import Call, CallPlan, plan_calls
from attnzoo.backends.varlen.kernels import Inputs, PackedKernel, no_device
from attnzoo.backends.varlen.sorted_calls import fold_heads
from attnzoo.errors import InvalidArgumentError, Refusal
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Request, Result

_HIDING_EXPONENT = 22  # the hiding component lowers the scaled scores of hidden keys by 2^22
_LARGEST_EXPONENT = 15  # the largest power of two in float16 is 2^15

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
    """Base class of backends with kernels for packed sequences.

    Options:
        kernel: the name of the kernel. None selects the first kernel that supports the request.

    Class attributes:
        kernels: the kernel classes of the backend, fastest first.
    """

    kernel: str | None = None
    kernels: ClassVar[tuple[type[PackedKernel], ...]] = ()

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
        return self._joined(request, self._choose(request)[1])

    def refusals_anywhere(self, request: Request) -> tuple[Refusal, ...]:
        return self._joined(request, min((kernel.refusals(request) for kernel in self._named()), key=len))

    def _joined(self, request: Request, of_kernel: tuple[Refusal, ...]) -> tuple[Refusal, ...]:
        """Return the refusals of the backend, and those refusals of the kernel whose fields the backend accepts."""
        refusals = [
            replace(reason, allowed=f"{reason.allowed}, or torch.autocast to one of them")
            if reason.field == "dtype" and request.dtype == torch.float32
            else reason
            for reason in super().refusals(request)
        ]
        fields = {reason.field for reason in refusals}
        return (*refusals, *(reason for reason in of_kernel if reason.field not in fields))

    def _named(self) -> list[type[PackedKernel]]:
        return [kernel for kernel in self.kernels if self.kernel in (None, kernel.name)]

    def _choose(self, request: Request) -> tuple[type[PackedKernel], tuple[Refusal, ...]]:
        """Return a kernel and its refusals. Prefer kernels without refusals, then kernels that this machine can run."""
        named = self._named()
        usable = [kernel for kernel in named if kernel.unavailable() is None]
        if not usable and self.kernel is not None:
            return named[0], (Refusal("kernel", f"{self.kernel!r}: {named[0].unavailable()}", "None (any kernel)"),)
        verdicts = [(kernel, (*kernel.refusals(request), *kernel.missing_parts(request))) for kernel in usable or named]
        return next((verdict for verdict in verdicts if not verdict[1]), verdicts[0])

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        return attend(attention, self._choose(attention.request())[0])


def attend(attention: Attention, kernel: type[PackedKernel]) -> Result:
    """Compute an attention with neither bias nor dense mask.

    If no query sees a key, no kernel runs, and the kernel name in the result is "none".
    """
    whole, attention = attention, positive_scale(attention)
    if any(isinstance(segment.pattern, SortedChunks) for segment in attention.segments):
        attention = fold_heads(attention)
    plan = plan_calls(attention, kernel.windows)
    hides = plan.has_spare_row or any(mask is not None for mask in plan.hidden)
    packed = _Packing(attention, plan, _Hiding(attention.scale) if hides else None)
    bind = partial(_PackedCalls, kernel, plan.calls, attention.scale, attention.dropout, {}, packed.places)
    visible_rows: Tensor | None
    if len(attention.segments) == 1 and plan.calls and not hides:
        output, visible_rows = packed.attend(bind(packed.query, packed.keys_values))
    else:
        output, lse = unite(bind, packed.query, packed.keys_values)
        visible_rows = packed.visible_rows(lse)
    output = output[: attention.batch * attention.q_len, :, : attention.value_dim]
    output = output.unflatten(0, (attention.batch, attention.q_len)).transpose(1, 2)
    if visible_rows is not None:
        visible_rows = visible_rows.reshape(whole.batch, -1, whole.q_len)
    output = whole.fill(output.reshape(whole.batch, whole.heads, whole.q_len, whole.value_dim), visible_rows)
    return Result(output, kernel.name if plan.calls else "none")


class _Hiding:
    """The values of the hiding component.

    Attributes:
        query: the value in queries, a power of two, so that multiplication does not round.
        key: the value in hidden keys, minus a power of two.
        depth: by how much the two values lower the scaled score of a hidden key.
    """

    def __init__(self, scale: float) -> None:
        exponent = min(math.ceil(_HIDING_EXPONENT - math.log2(scale)), 2 * _LARGEST_EXPONENT)
        self.depth = scale * 2.0**exponent
        if self.depth < 2.0 ** (_HIDING_EXPONENT / 2):
            least = f"at least 2**{_HIDING_EXPONENT // 2 - 2 * _LARGEST_EXPONENT} if the kernel must hide keys"
            raise InvalidArgumentError("scale", scale, least)
        self.query = 2.0 ** min(exponent - exponent // 2, _LARGEST_EXPONENT)
        self.key = -(2.0**exponent) / self.query


class _Packing:
    """Queries, keys and values in the kernel layout ``(rows, heads, dim)``. Each distinct tensor is packed once.

    Attributes:
        query: the queries ``(batch * q_len, heads, dim)``. If the plan uses the spare row, this row is the last.
        keys_values: the distinct key tensors and value tensors ``(batch * kv_len, kv_heads, dim)``, with the spare row
            as in ``query``.
        places: segment ``i`` has keys ``keys_values[places[2 * i]]`` and values ``keys_values[places[2 * i + 1]]``.
    """

    def __init__(self, attention: Attention, plan: CallPlan, hiding: _Hiding | None) -> None:
        self._attention, self._plan, self._hiding = attention, plan, hiding
        dim = max(attention.head_dim + (hiding is not None), attention.value_dim)
        self._dim = -(-dim // 8) * 8
        rows = attention.query.new_full((attention.batch, attention.q_len), 0.0 if hiding is None else hiding.query)
        self.query = self._pack(attention.query, rows, 0.0)
        self.keys_values: list[Tensor] = []
        self.places: list[int] = []
        known: dict[tuple[object, ...], int] = {}
        for segment, hidden in zip(attention.segments, plan.hidden, strict=True):
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
        """Return ``(batch, heads, n, d)`` as ``(batch * n, heads, dim)``, plus the spare row if the plan uses it.

        ``numbers`` ``(batch, n)`` are the values of the hiding component, and ``spare`` is its value in the spare row.
        All other components of the spare row are 0.
        """
        rows = tensor.transpose(1, 2).flatten(0, 1)
        padding = self._dim - rows.shape[2]
        if padding:
            extra = rows.new_zeros((*rows.shape[:2], padding))
            if numbers is not None:
                extra[..., 0] = numbers.flatten()[:, None]
            rows = torch.cat([rows, extra], dim=2)
        if self._plan.has_spare_row:
            last = rows.new_zeros((1, *rows.shape[1:]))
            last[..., tensor.shape[3] : tensor.shape[3] + 1] = spare
            rows = torch.cat([rows, last])
        return rows if _is_aligned(rows) else rows.clone(memory_format=torch.contiguous_format)

    def attend(self, packed: _PackedCalls) -> tuple[Tensor, Tensor | None]:
        """Return the output ``(rows, heads, dim)`` of a single segment without hidden keys. This needs no union.

        The second result is bool ``(batch, 1, q_len)``, True for queries that see a key, or None for all queries.
        """
        calls = self._plan.calls
        outputs = [packed.kernel.attend(packed.inputs(call)) for call in calls]
        rows = [call.q_rows for call in calls if call.q_rows is not None]
        if not rows:
            return outputs[0], None
        index = torch.cat(rows)
        visible = torch.zeros(self.query.shape[0], dtype=torch.bool, device=index.device).index_fill(0, index, True)
        whole = outputs[0].new_zeros(self.query.shape).index_copy(0, index, torch.cat(outputs))
        return whole, visible.view(self._attention.batch, 1, self._attention.q_len)

    def visible_rows(self, lse: Tensor) -> Tensor:
        """Return bool ``(batch, heads, q_len)``, True for queries that see a key, from the lse ``(rows, heads)``."""
        batch, q_len = self._attention.batch, self._attention.q_len
        floor = -math.inf if self._hiding is None else -self._hiding.depth / 2
        return (lse[: batch * q_len] > floor).unflatten(0, (batch, q_len)).transpose(1, 2)


def _is_aligned(rows: Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes, as kernels need to load 16 bytes at once."""
    *outer, inner = rows.stride()
    return inner == 1 and all(step % 8 == 0 for step in (*outer, rows.storage_offset()))


def _take_rows(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


class _PackedRows(NamedTuple):
    """Which rows of the packed queries or of the packed keys a call uses.

    If these are query rows, ``parts`` has one element: the key rows of the same call.
    """

    call: int  # the index of the call
    segment: int  # the index of the segment
    numbers: Tensor | None  # row indices; None: all rows in order
    parts: tuple[_PackedRows, ...] = ()

    def take(self, tensor: Tensor) -> Tensor:
        return _take_rows(tensor, self.numbers)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        if self.numbers is None:
            tensor.copy_(values)
        else:
            tensor.index_copy_(0, self.numbers, values.to(tensor.dtype))

    def add(self, tensor: Tensor, values: Tensor) -> None:
        if self.numbers is None:
            tensor += values
        else:
            tensor.index_add_(0, self.numbers, values.to(tensor.dtype))


@dataclass(eq=False)
class _PackedCalls(PartialKernel):
    """A :class:`PartialKernel` that computes one part per call of a :class:`PackedKernel`.

    ``out`` is ``(rows, heads, dim)`` and ``lse`` is ``(rows, heads)``, with the rows of the packed queries.
    """

    kernel: type[PackedKernel]
    calls: tuple[Call, ...]
    scale: float
    dropout: float
    states: dict[int, Any]  # per call: the state from the forward for the backward
    places: list[int]
    query: Tensor
    tensors: Sequence[Tensor]

    def inputs(self, call: Call) -> Inputs:
        key, value = (_take_rows(tensor, call.k_rows) for tensor in self.keys_values(call.segment))
        return Inputs(_take_rows(self.query, call.q_rows), key, value, call.sequences, self.scale, self.dropout)

    def new_results(self) -> tuple[Tensor, Tensor]:
        rows, heads, _ = self.query.shape
        out = self.query.new_zeros(self.query.shape, dtype=torch.float32)
        # Kernels need the memory layout (heads, rows).
        return out, self.query.new_full((heads, rows), -math.inf, dtype=torch.float32).transpose(0, 1)

    def forward_plan(self) -> Iterator[tuple[bool, _PackedRows]]:
        for number, call in enumerate(self.calls):
            keys = _PackedRows(number, call.segment, call.k_rows)
            yield number == 0, _PackedRows(number, call.segment, call.q_rows, (keys,))

    def forward(self, rows: _PackedRows, number: int) -> tuple[Tensor, Tensor]:
        out, lse, self.states[rows.call] = self.kernel.forward(self.inputs(self.calls[rows.call]))
        return out, lse.transpose(0, 1)

    def backward(self, rows: _PackedRows, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Grads]:
        results = (grad_out.contiguous(), out, lse.transpose(0, 1).contiguous())
        return (self.kernel.backward(self.inputs(self.calls[rows.call]), *results, self.states[rows.call]),)
