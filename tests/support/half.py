"""Helpers for tests of packed kernels: attentions in half precision, and their checks."""

import torch

import attnzoo
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.testing import AttentionCase

HALF = torch.float16


def heads(length, count=2, dim=8, dtype=HALF, seed=0, grad=False):
    random = torch.Generator().manual_seed(seed)
    return torch.randn((2, count, length, dim), generator=random).to(dtype).requires_grad_(grad)


def attention(pattern, q_len=20, kv_len=20, dim=8, kv_heads=2, key_mask=None, query_mask=None, scale=0.3, grad=False):
    key, value = (heads(kv_len, kv_heads, dim, seed=seed, grad=grad) for seed in (1, 2))
    segment = attnzoo.Segment(key, value, pattern, key_mask=key_mask)
    return attnzoo.Attention(heads(q_len, 2, dim, grad=grad), (segment,), scale, query_mask=query_mask)


def unpadded(*lengths, of=20):
    return torch.arange(of)[None] < torch.tensor(lengths)[:, None]


def agrees(whole, backend):
    report = check_attention("case", whole, backend, grad=True, max_rows=ALL_ROWS)
    assert all(check.ok for check in report.checks), str(report.checks)
    return report.kernel


def refusals(backend=None, **changes):
    case = AttentionCase(**{**dict(dtype=HALF, grad=False), **changes})
    reasons = (backend or FlashBackend()).refusals(case.attention().request(case.probabilities))
    return {reason.field: (reason.got, reason.allowed) for reason in reasons}
