"""The exact union of partial softmaxes, forward and backward, for every kernel that returns ``(out, lse)``.

A kernel computes the attention over each part ``i`` of the keys: the output ``out_i``, and the log-sum-exp of the
scores, ``lse_i``. Then ``lse = logsumexp(lse_i)`` and ``out = sum(exp(lse_i - lse) * out_i)`` (Milakov & Gimelshein
2018, arXiv:1805.02867; used across devices by Ring Attention, arXiv:2310.01889). With the *final* out and lse, the
backward of each part is exact, because the other parts affect the gradients only through out and lse.

To add a GPU kernel for packed sequences, copy ``varlen/varlen_kernel.py``. To add a kernel with a different interface,
subclass :class:`PartialKernel` and call :func:`unite`, as ``sdpa/flash_cpu.py`` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Grads = tuple[Tensor, Tensor, Tensor]


class PartialKernel(ABC):
    """A kernel that returns ``(out, lse)`` of a part of the keys. Each object is made for the tensors of one attention.

    ``forward_plan`` and ``backward_plan`` yield ``(is_first, rows)``. The object ``rows`` represents some queries:

    - ``rows.take(tensor)`` returns the rows of these queries in out, lse or a gradient.
    - ``rows.put(tensor, values)`` overwrites these rows. ``rows.add(tensor, values)`` adds to these rows.
    - ``rows.parts`` are the parts of the keys that the queries see. ``part.segment`` is a segment index.
      ``part.add(tensor, values)`` adds to the rows of the part in a key gradient or value gradient.

    A plan may yield a query several times. ``is_first`` must be False if the plan has yielded a query of ``rows``
    before. If ``is_first`` is True, :func:`unite` ignores the content of the rows in out, lse and the gradient.

    Attributes:
        places: segment ``i`` has the keys ``tensors[places[2 * i]]`` and the values ``tensors[places[2 * i + 1]]``.
        query: the query tensor in the layout of the kernel.
        tensors: the distinct key and value tensors, followed by further tensors that get a gradient.
    """

    places: Sequence[int]
    query: Tensor
    tensors: Sequence[Tensor]

    def keys_values(self, segment: int) -> list[Tensor]:
        """Return the key tensor and the value tensor of a segment."""
        return [self.tensors[place] for place in self.places[2 * segment : 2 * segment + 2]]

    @abstractmethod
    def new_results(self) -> tuple[Tensor, Tensor]:
        """Return new tensors out and lse. All lse are ``-inf``.

        out may be uninitialised in the rows that :meth:`forward_plan` yields with ``is_first``, and is 0 elsewhere.
        """

    @abstractmethod
    def forward_plan(self) -> Iterable[tuple[bool, Any]]:
        """Yield ``(is_first, rows)``. Each pair of a query and a key that it sees must be in exactly one part."""

    @abstractmethod
    def forward(self, rows: Any, number: int) -> tuple[Tensor, Tensor]:
        """Return out and lse of ``rows.parts[number]``. If a query sees no key, out is finite and lse is ``-inf``."""

    def backward_plan(self) -> Iterable[tuple[bool, Any]]:
        """Yield ``(is_first, rows)`` for the backward. The default is the plan of the forward."""
        return self.forward_plan()

    @abstractmethod
    def backward(self, rows: Any, grad_out: Tensor, out: Tensor, lse: Tensor) -> Iterable[Grads]:
        """Return the gradients of query, key and value for each part of ``rows.parts``.

        ``grad_out``, ``out`` and ``lse`` are from ``rows.take``. ``out`` and ``lse`` are merged over all parts.
        """

    def further_gradients(self) -> list[Tensor]:
        """Return the gradients of the tensors in ``tensors`` that are neither keys nor values.

        :func:`unite` calls this after all calls of :meth:`backward`.
        """
        return []


Bind = Callable[[Tensor, Sequence[Tensor]], PartialKernel]


def unite(bind: Bind, query: Tensor, tensors: Sequence[Tensor], masks: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """Return the attention over the union of all parts, with gradients.

    Args:
        bind: a function that makes the kernel from ``query`` and ``tensors``. Forward and backward each call ``bind``.
        query, tensors: the inputs with gradients, as described for the attributes of :class:`PartialKernel`.
        masks: further tensors that the backward reads. PyTorch raises if these tensors change before the backward.

    Returns:
        The output in the dtype of the query, and lse without a gradient. Queries that see no key have lse ``-inf``.
    """
    output, lse = _Union.apply(bind, masks, query, *tensors)
    return output, lse


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bind: Bind, masks: Sequence[Tensor], query: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        kernel = bind(query, tensors)
        out, lse = kernel.new_results()
        for is_first, rows in kernel.forward_plan():
            before = None if is_first else (rows.take(out), rows.take(lse))
            merged = before
            for number in range(len(rows.parts)):
                part = kernel.forward(rows, number)
                merged = part if merged is None else _merge(*merged, *part)
            if merged is None:  # no part and no earlier result exists for these rows
                rows.put(out, torch.zeros_like(rows.take(out)))
            else:
                for whole, new in zip((out, lse), merged, strict=True):
                    if before is None or not _share_memory(whole, new):  # a merge is in place if the rows are a view
                        rows.put(whole, new)
        out = out.to(query.dtype)
        ctx.bind, ctx.count = bind, len(tensors)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(query, out, lse, *tensors, *masks)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, out, lse, *tensors = ctx.saved_tensors[: 3 + ctx.count]
        kernel = ctx.bind(query, tensors)
        grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        # A row that sees no key has lse -inf, and a kernel would compute inf - inf. With lse 0 all weights become 0.
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        # zeros_like keeps the layout of the input, so a projection merges the heads in the backward without a copy.
        trained = (query, *tensors[: 1 + max(kernel.places)])
        grad_query, *grads = (torch.zeros_like(tensor, dtype=lse.dtype) for tensor in trained)
        with torch.autocast(query.device.type, enabled=False):  # the caller of backward() may use autocast
            for is_first, rows in kernel.backward_plan():
                write = rows.put if is_first else rows.add
                gradients = kernel.backward(rows, rows.take(grad_out), rows.take(out), rows.take(lse))
                for part, (grad_q, *grad_kv) in zip(rows.parts, gradients, strict=True):
                    write(grad_query, grad_q)
                    write = rows.add
                    for place, grad in zip(kernel.places[2 * part.segment :], grad_kv, strict=False):
                        part.add(grads[place], grad)
            further = kernel.further_gradients()
        return None, None, *(grad.to(query.dtype) for grad in (grad_query, *grads)), *further


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``out`` ``(..., dim)`` and ``lse`` ``(...)`` merged with those of a part. The inputs may change."""
    out = out.to(lse.dtype)
    share = torch.sigmoid(part_lse - lse)  # exp(part_lse - total); 1 - share is exp(lse - total)
    share = share.masked_fill_(part_lse == float("-inf"), 0.0)
    out.lerp_(part_out.to(out.dtype), share.unsqueeze(-1))
    return out, lse.copy_(torch.logaddexp(lse, part_lse))
