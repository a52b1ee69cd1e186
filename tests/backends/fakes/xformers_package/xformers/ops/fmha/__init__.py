"""The functions of xformers 0.0.35 that attnzoo calls, with their signatures, on operators in plain torch."""

import torch

import xformers.ops.fmha.attn_bias  # noqa: F401  attnzoo reads it as an attribute
from xformers.ops.fmha import cutlass, flash  # noqa: F401
from xformers.ops.fmha.operators import Inputs  # noqa: F401

CALLS = []  # name, operator, bias and tensors of each call


class _fMHA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, attn_bias, scale, query, key, value):
        out, lse = op[0].forward(query, key, value, attn_bias, scale)
        ctx.save_for_backward(out, lse, query, key, value)
        ctx.rest = (op, attn_bias, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        op, attn_bias, scale = ctx.rest
        out, lse, *inputs = ctx.saved_tensors
        lse = lse.nan_to_num(nan=torch.inf)  # entries that the kernel did not write
        return None, None, None, *op[1].backward(grad, out, lse, *inputs, attn_bias, scale)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    CALLS.append(("attention", op[0].NAME, attn_bias, (query, key, value)))
    assert p == 0.0 and output_dtype is None
    return _fMHA.apply(op, attn_bias, scale, query, key, value)


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    if p != 0.0:
        raise NotImplementedError("dropout is not supported on the non-autograd API.")
    CALLS.append(("forward", op.NAME, attn_bias, (query, key, value)))
    assert output_dtype is None
    return op.forward(query, key, value, attn_bias, scale)


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    if p != 0.0:
        raise NotImplementedError("dropout is not supported on the non-autograd API.")
    CALLS.append(("backward", op.NAME, attn_bias, (query, key, value)))
    return op.backward(grad, output, lse, query, key, value, attn_bias, scale)
