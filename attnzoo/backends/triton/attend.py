"""The attention as an operation of autograd."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from attnzoo.backends.triton.backward import Backward
from attnzoo.backends.triton.forward import new_seed, run_forward
from attnzoo.backends.triton.kernels.arguments import Softmax
from attnzoo.backends.triton.plan import Inputs, Plan, split, tables, with_contiguous_rows
from attnzoo.errors import BackendRefusedError, Refusal
from attnzoo.spec.segments import Attention

_SECOND_DERIVATIVE = Refusal("create_graph", "True", "False, because the kernels have no second derivative")


def attend(attention: Attention) -> Tensor:
    """Return the output ``(batch, heads, q_len, value_dim)``, with gradients."""
    plan, inputs = split(attention)
    empty = inputs.empty
    if empty is not None and plan.dropout > 0.0:  # one random choice per query and head, as in Attention.fill
        empty = empty * torch.nn.functional.dropout(torch.ones_like(empty[..., :1]), plan.dropout)
    tensors = (inputs.query, *inputs.keys_values, *inputs.biases)
    output: Tensor = _Attend.apply(plan, len(inputs.keys_values), empty, *tensors)
    return output


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, count: int, empty: Tensor | None, query: Tensor, *tensors: Tensor) -> Tensor:
        inputs = tables(Inputs(query, tensors[:count], tensors[count:], empty), plan)
        seed = new_seed(plan)
        with _on_device(plan):
            out, softmax = run_forward(plan, inputs, seed)
        ctx.plan, ctx.count, ctx.has_empty, ctx.dtypes = plan, count, empty is not None, [t.dtype for t in tensors]
        # Save the tables in float32, in which the backward reads them. So they are converted only once.
        saved = [*softmax, out, query, *tensors[:count], *inputs.biases, *([] if seed is None else [seed])]
        # The backward reads the masks from the plan. PyTorch raises if saved tensors change before the backward.
        ctx.save_for_backward(*saved, *plan.masks())
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True; once_differentiable would return constants instead
            raise BackendRefusedError("triton", {"attention": (_SECOND_DERIVATIVE,)}, {})
        plan, count = ctx.plan, ctx.count
        top, log_sum, out, query, *rest = ctx.saved_tensors
        tensors = tuple(rest[: len(ctx.dtypes)])
        seed = rest[len(tensors)] if plan.dropout > 0.0 else None
        keys_values = tuple(map(with_contiguous_rows, tensors[:count]))
        inputs = Inputs(with_contiguous_rows(query), keys_values, tensors[count:], None)
        needs_empty, needs_query, *needs = ctx.needs_input_grad[2:]
        grads: list[Tensor | None] = [None] * len(tensors)
        backward = Backward(plan, inputs, seed, out, Softmax(top, log_sum), with_contiguous_rows(grad_out))
        needs_biases = needs[count:]
        dtypes = [dtype if need else None for dtype, need in zip(ctx.dtypes[count:], needs_biases, strict=True)]
        needs_ends = any(need and form for need, form in zip(needs_biases, _are_tables(plan), strict=True))
        with _on_device(plan):
            grad_query, ends = backward.queries(needs_ends)
            if any(needs[:count]):
                grads[:count] = backward.keys_values()
            grads[count:] = backward.biases(dtypes, ends)
        grad_empty = _empty_gradient(plan, grad_out, log_sum) if ctx.has_empty and needs_empty else None
        return None, None, grad_empty, grad_query if needs_query else None, *grads


def _on_device(plan: Plan) -> AbstractContextManager[object]:
    """Return a context in which Triton launches kernels on the device of the tensors."""
    return torch.cuda.device(plan.device) if plan.device.type == "cuda" else nullcontext()


def _are_tables(plan: Plan) -> list[bool]:
    return [form.has_table for form in plan.forms if form.bias]


def _empty_gradient(plan: Plan, grad_out: Tensor, log_sum: Tensor) -> Tensor:
    """Return the gradient of ``empty``: the output gradient of queries that see no key and are not padding, else 0."""
    takes = log_sum == float("inf")
    if plan.query_mask is not None:
        takes = takes & plan.query_mask[:, None]
    return grad_out.masked_fill(~takes[..., None], 0.0)
