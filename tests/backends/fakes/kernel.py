"""FlashAttention 2's kernels for packed sequences in plain torch on the CPU, with exactly their interface.

Written from the documented semantics and the checks of ``csrc/flash_attn/flash_api.cpp`` (2.6 to 2.8). Softmax in
float32, results rounded to the dtype of the inputs; the backward computes from its arguments ``out`` and ``lse``.
"""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)


def check(q, k, v, cu_q, cu_k, max_q, max_k):
    """Raise on all inputs that the kernels do not accept."""
    for name, tensor in dict(q=q, k=k, v=v).items():
        assert tensor.ndim == 3, f"{name} has shape {tuple(tensor.shape)}"
        assert tensor.dtype in HALF and tensor.dtype == q.dtype, f"{name} is {tensor.dtype}"
        assert tensor.stride(-1) == 1, f"{name} must have a contiguous last dimension"
        assert tensor.shape[2] == q.shape[2] <= 256 and tensor.shape[2] % 8 == 0, f"{name} has {tensor.shape[2]} dims"
        aligned = tensor.stride(0) % 8 == 0 and tensor.stride(1) % 8 == 0 and tensor.data_ptr() % 16 == 0
        assert aligned, f"{name} is not aligned: {tensor.stride()}, {tensor.data_ptr()}"
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    for cu, total, most in ((cu_q, q.shape[0], max_q), (cu_k, k.shape[0], max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.numel() == cu_q.numel() > 1
        lengths = cu.diff()
        assert int(cu[0]) == 0 and int(cu[-1]) == total and int(lengths.min()) > 0 and int(lengths.max()) == most


def visible(n, m, causal, left, right, max_k):
    """Which of ``m`` keys each of ``n`` queries sees; the last query is aligned with the last key.

    An extent of ``max_k`` or more means no limit. If only one extent has no limit, it becomes ``max_k``.
    """
    left, right = (-1 if extent >= max_k else extent for extent in (left, 0 if causal else right))
    position = torch.arange(n)[:, None] + (m - n)
    key = torch.arange(m)
    if left < 0 and right < 0:
        return torch.ones((n, m), dtype=torch.bool)
    left, right = (max_k if extent < 0 else extent for extent in (left, right))
    return (key >= position - left) & (key <= position + right)


def sequences(cu_q, cu_k):
    """Row indices of queries ``(count, n)`` and keys ``(count, m)``. Yield all sequences of equal lengths together."""
    assert len(cu_q) <= 65536, "CUDA: invalid configuration argument"  # the grid's second dimension is the sequences
    groups = {}
    q, k = cu_q.tolist(), cu_k.tolist()
    for q0, q1, k0, k1 in zip(q, q[1:], k, k[1:], strict=False):
        starts = groups.setdefault((q1 - q0, k1 - k0), ([], []))
        starts[0].append(q0)
        starts[1].append(k0)
    for (n, m), (q_starts, k_starts) in groups.items():
        yield torch.tensor(q_starts)[:, None] + torch.arange(n), torch.tensor(k_starts)[:, None] + torch.arange(m)


def scores(q, k, scale, visible):
    """``(count, heads, n, m)`` in float32."""
    keys = k.float().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    mask = torch.zeros(visible.shape, dtype=torch.float32).masked_fill(~visible, -torch.inf)
    return torch.einsum("cnhd,cmhd->chnm", q.float(), keys) * scale + mask


def kept(shape, dropout, generator):
    """Factors on the softmax weights: 0 or ``1 / (1 - dropout)``."""
    return (torch.rand(shape, generator=generator, dtype=torch.float32) >= dropout).float() / (1.0 - dropout)


@torch.autocast("cpu", enabled=False)
def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, causal, left, right, check=check):
    """Output ``(total_q, heads, dim)``, lse ``(heads, total_q)`` float32 (inf if the row sees no key), random state."""
    check(q, k, v, cu_q, cu_k, max_q, max_k)
    out, lse = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32),
    )
    state = torch.randint(1 << 40, (2,)) if dropout else torch.zeros(2, dtype=torch.long)
    generator = torch.Generator().manual_seed(int(state[0]))
    for rows, keys in sequences(cu_q, cu_k):
        s = scores(q[rows], k[keys], scale, visible(rows.shape[1], keys.shape[1], causal, left, right, max_k))
        total = s.logsumexp(-1)
        weights = (s - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp()
        if dropout:
            weights = weights * kept(weights.shape, dropout, generator)
        values = v[keys].float().repeat_interleave(q.shape[1] // v.shape[1], dim=2)
        out[rows] = torch.einsum("chnm,cmhd->cnhd", weights, values).to(q.dtype)
        lse[:, rows] = total.masked_fill(total == -torch.inf, torch.inf).transpose(0, 1)
    return out, lse, state


@torch.autocast("cpu", enabled=False)
def backward(
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, scale, causal, left, right, state, check=check
):
    """Gradients of q, k, v."""
    check(q, k, v, cu_q, cu_k, max_q, max_k)
    for tensor in (grad, out):
        assert tensor.shape == q.shape and tensor.dtype == q.dtype and tensor.stride(-1) == 1
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == torch.float32 and lse.is_contiguous()
    group = q.shape[1] // k.shape[1]
    grads = [torch.zeros(tensor.shape, dtype=torch.float32) for tensor in (q, k, v)]
    generator = torch.Generator().manual_seed(int(state[0]))
    for rows, keys in sequences(cu_q, cu_k):
        s = scores(q[rows], k[keys], scale, visible(rows.shape[1], keys.shape[1], causal, left, right, max_k))
        weights = (s - lse[:, rows].transpose(0, 1)[..., None]).exp()
        factor = kept(weights.shape, dropout, generator) if dropout else torch.ones((), dtype=torch.float32)
        g, o = grad[rows].float(), out[rows].float()
        wide_keys, values = (x[keys].float().repeat_interleave(group, dim=2) for x in (k, v))
        grad_weights = torch.einsum("cnhd,cmhd->chnm", g, values) * factor
        grad_scores = weights * (grad_weights - (g * o).sum(-1).transpose(1, 2)[..., None]) * scale
        grads[0][rows] = torch.einsum("chnm,cmhd->cnhd", grad_scores, wide_keys)
        for index, per_head in (
            (1, torch.einsum("chnm,cnhd->cmhd", grad_scores, q[rows].float())),
            (2, torch.einsum("chnm,cnhd->cmhd", weights * factor, g)),
        ):
            grads[index][keys] = per_head.unflatten(2, (-1, group)).sum(3)
    return tuple(grad.to(q.dtype) for grad in grads)
