"""The functions of ``flash_attn`` 2.8 that attnzoo calls, with their signatures, on a kernel in plain torch."""

from types import SimpleNamespace

import torch

from tests.backends.fakes import kernel

# The compiled extension, which the fake functions do not call.
flash_attn_gpu = SimpleNamespace(varlen_fwd=kernel.forward, varlen_bwd=kernel.backward)

CALLS = []  # name and arguments of each call


def _note(name, **arguments):
    CALLS.append((name, arguments))


def _wrapped_flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
):
    window = (window_size_left, window_size_right)
    _note("forward", cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, causal=causal, window=window, q=q, k=k, v=v)
    assert softcap == 0.0 and alibi_slopes is None and not return_softmax
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse, state = kernel.forward(q, k, v, *lengths, dropout_p, softmax_scale, causal, *window)
    return out, lse, torch.empty(0), state


def _wrapped_flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
):
    window = (window_size_left, window_size_right)
    flags = dict(causal=causal, window=window, deterministic=deterministic)
    _note("backward", cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, lse=softmax_lse, **flags)
    assert softcap == 0.0 and alibi_slopes is None
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    settings = (dropout_p, softmax_scale, causal, *window, rng_state)
    grads = kernel.backward(dout, q, k, v, out, softmax_lse, *lengths, *settings)
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        given.copy_(grad)
    return torch.empty(0)


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, settings):
        out, lse, state = kernel.forward(q, k, v, *lengths, *settings)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (*lengths, *settings, state)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *kernel.backward(grad.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    _note("func", cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, causal=causal, window=window_size, dropout=dropout_p, q=q, k=k)
    assert softcap == 0.0 and alibi_slopes is None and not return_attn_probs and block_table is None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _Varlen.apply(q, k, v, lengths, (dropout_p, scale, causal, *window_size))
