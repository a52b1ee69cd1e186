"""The union of partial softmaxes, exact in forward and backward: one executor for every kernel that returns (out, lse).

Attention over a union of key sets follows from the attention over each set: with ``lse`` the log-sum-exp of a part's
scores, ``lse = logsumexp(lse_i)`` and ``out = sum(exp(lse_i - lse) * out_i)`` (Milakov & Gimelshein 2018,
arXiv:1805.02867; used across devices by Ring Attention, arXiv:2310.01889). The backward of each part is exact when it
gets the *final* out and lse, because the gradient of a softmax needs nothing else of the other parts.

To add a GPU kernel that takes packed sequences, copy ``varlen/varlen_kernel.py``; ``varlen/packed.py`` unites its
calls. To unite a kernel with another interface, subclass :class:`PartialKernel` and call :func:`unite`, as
``sdpa/flash_cpu.py`` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor


class SegmentPart(Protocol):
    """Some keys of one segment."""

    @property
    def segment(self) -> int:
        """The number of the segment."""


class QueryRows(Protocol):
    """Some query rows, and the parts of the keys they see."""

    @property
    def parts(self) -> Sequence[SegmentPart]:
        """What the rows see; may be empty."""

    def take(self, tensor: Tensor) -> Tensor:
        """Return these rows of a query-shaped tensor, or of one without its last dimension (lse)."""

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write these rows."""

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Add to these rows."""


R = TypeVar("R", bound=QueryRows)
Grads = tuple[Tensor, Tensor, Tensor]


class PartialKernel(ABC, Generic[R]):
    """A kernel that returns ``(out, lse)`` of a part, bound to the tensors of one attention.

    The rows that a plan yields with ``is_first=True`` must not overlap; they are written without being read.
    """

    @abstractmethod
    def new_results(self) -> tuple[Tensor, Tensor]:
        """Return memory for out, and lse filled with ``-inf``; out may hold garbage where first rows will write."""

    @abstractmethod
    def forward_plan(self) -> Iterable[tuple[bool, R]]:
        """Yield ``(is_first, rows)`` until every query has met every key it sees."""

    @abstractmethod
    def forward(self, rows: R, number: int) -> tuple[Tensor, Tensor]:
        """Return out and lse of the rows over part ``number``; lse is ``-inf`` and out finite if a row sees no key."""

    def backward_plan(self) -> Iterable[tuple[bool, R]]:
        """Yield ``(is_first, rows)`` for the backward, by default those of the forward."""
        return self.forward_plan()

    @abstractmethod
    def backward(self, rows: R, grad_out: Tensor, out: Tensor, lse: Tensor) -> Iterable[Grads]:
        """Return the gradients of query, key and value for each part, given these rows of the final out and lse."""

    @abstractmethod
    def add_keys(self, part: Any, grad: Tensor, values: Tensor) -> None:
        """Add a part's gradient to the gradient of a whole key or value tensor."""

    def further_gradients(self) -> list[Tensor]:
        """Return the gradients of the tensors that follow keys and values, after the backward of all rows."""
        return []


Bind = Callable[[Tensor, Sequence[Tensor]], PartialKernel[Any]]


def unite(
    bind: Bind, places: Sequence[int], query: Tensor, tensors: Sequence[Tensor], watched: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Run a union on a kernel, with gradients.

    Args:
        bind: makes the kernel from the query and ``tensors``; the forward and each backward call it.
        places: for each segment, the number of its key and of its value among ``tensors``: key, value, key, ...
        query: in the layout of the kernel's rows.
        tensors: the distinct keys and values, then further tensors with a gradient.
        watched: masks that the backward reads: PyTorch raises if they were written to in between.

    Returns:
        The output in the query's dtype, and lse without a gradient, ``-inf`` in rows that see no key.
    """
    output, lse = _Union.apply(bind, tuple(places), tuple(watched), query, *tensors)
    return output, lse


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bind: Bind, places: tuple[int, ...], watched: tuple[Tensor, ...], query: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        kernel = bind(query, tensors)
        out, lse = kernel.new_results()
        for is_first, rows in kernel.forward_plan():
            merged = None if is_first else (rows.take(out), rows.take(lse))
            for number in range(len(rows.parts)):
                part = kernel.forward(rows, number)
                if merged is not None:
                    merge_(*merged, *part)
                else:
                    merged = part if len(rows.parts) == 1 else (part[0].to(lse.dtype), part[1])
            if merged is None:  # first rows, which see no key
                rows.put(out, torch.zeros_like(rows.take(out)))
            else:
                rows.put(out, merged[0])
                rows.put(lse, merged[1])
        out = out.to(query.dtype)
        ctx.bind, ctx.places, ctx.count = bind, places, len(tensors)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(query, out, lse, *tensors, *watched)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, out, lse, *tensors = ctx.saved_tensors[: 3 + ctx.count]
        with torch.autocast(query.device.type, enabled=False):  # the caller of backward() may be in one
            kernel = ctx.bind(query, tensors)
            return None, None, None, *_backward(kernel, ctx.places, grad_out, query, out, lse, tensors)


def _backward(
    kernel: PartialKernel[QueryRows],
    places: tuple[int, ...],
    grad_out: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    tensors: list[Tensor],
) -> list[Tensor]:
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    # A row that sees no key has lse -inf, and a kernel would compute inf - inf; with 0 its weights become 0.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    # zeros_like keeps the layout of the input: projections merge heads in memory, and then need no copy of a gradient.
    grad_query = torch.zeros_like(query, dtype=lse.dtype)
    grads = [torch.zeros_like(tensor, dtype=lse.dtype) for tensor in tensors[: 1 + max(places)]]
    for is_first, rows in kernel.backward_plan():
        write = rows.put if is_first else rows.add
        gradients = kernel.backward(rows, rows.take(grad_out), rows.take(out), rows.take(lse))
        for part, (grad_q, grad_k, grad_v) in zip(rows.parts, gradients, strict=True):
            write(grad_query, grad_q)
            write = rows.add
            key, value = places[2 * part.segment : 2 * part.segment + 2]
            kernel.add_keys(part, grads[key], grad_k)
            kernel.add_keys(part, grads[value], grad_v)
    return [*(grad.to(query.dtype) for grad in (grad_query, *grads)), *kernel.further_gradients()]


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a further part into ``out`` and ``lse``, in place.

    Args:
        out: ``(..., n, d)``, the union so far, in the accumulation dtype.
        lse: ``(..., n)``, its log-sum-exp; ``-inf`` in rows that have seen no key yet.
        part_out: ``(..., n, d)``, the attention over the further keys.
        part_lse: ``(..., n)``; ``-inf`` in rows that see no key of the part (``part_out`` must be finite there).
    """
    share = torch.sigmoid(part_lse - lse)  # exp(part_lse - total); one minus it is exp(lse - total)
    share = share.masked_fill_(part_lse == float("-inf"), 0.0)
    out.lerp_(part_out.to(out.dtype), share.to(out.dtype).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))
