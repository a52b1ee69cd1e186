"""PyTorch's FlashAttention operators, which ``torch.nn.attention.varlen`` calls, on the CPU."""

import contextlib

import torch

from tests.backends.fakes import kernel


@contextlib.contextmanager
def cpu_operators():
    """Register the two operators for CPU tensors, and yield a list that records their calls."""
    calls = []

    def forward(
        query, key, value, cum_q, cum_k, max_q, max_k, dropout, causal, return_debug_mask, *, scale=None, **rest
    ):
        window = (rest.pop("window_size_left", -1), rest.pop("window_size_right", -1))
        assert not return_debug_mask and all(given is None for given in rest.values()), rest
        calls.append(("forward", dict(cu_q=cum_q, cu_k=cum_k, causal=causal, window=window, q=query, k=key, v=value)))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse, _ = kernel.forward(query, key, value, cum_q, cum_k, max_q, max_k, dropout, scale, causal, *window)
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(
        grad, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, state, unused, *, scale, **rest
    ):
        window = (rest.pop("window_size_left", -1), rest.pop("window_size_right", -1))
        assert not rest, rest
        calls.append(("backward", dict(cu_q=cum_q, cu_k=cum_k, causal=causal, window=window, lse=lse)))
        grad = grad.contiguous()
        lengths = (cum_q, cum_k, max_q, max_k)
        return kernel.backward(grad, query, key, value, out, lse, *lengths, dropout, scale, causal, *window, state)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield calls
