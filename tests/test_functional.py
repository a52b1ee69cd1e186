"""``attnzoo.attention``: one attention on any backend."""

from __future__ import annotations

import pytest
import torch

import attnzoo


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_attention_agrees_with_pytorch(backend):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(attnzoo.attention(q, k, v, attnzoo.Causal(), backend=backend), expected, atol=1e-5)
    even = attnzoo.attention(q, k, v, scale=0.0, backend=backend)
    assert torch.allclose(even[:, 0, 0], v[:, 0].mean(1), atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_attention_with_masks_global_keys_and_bias(backend):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    key_mask, global_keys, query_mask = (torch.ones(2, 10, dtype=torch.bool) for _ in range(3))
    key_mask[0, 7:] = query_mask[1, :2] = False
    global_keys[:] = False
    global_keys[0, 1] = global_keys[1, 8] = True
    i, j = torch.arange(10)[:, None], torch.arange(10)
    seen = (((j - i).abs() <= 2)[None] | global_keys[:, None]) & key_mask[:, None]
    scores = (q @ k.mT / 2).masked_fill(~seen[:, None], float("-inf"))
    expected = (scores.softmax(-1) @ v).nan_to_num() * query_mask[:, None, :, None]  # queries that see no key give zero
    more = dict(key_mask=key_mask, query_mask=query_mask, backend=backend)
    got = attnzoo.attention(q, k, v, attnzoo.Window(2, 2), global_keys=global_keys, **more)
    assert torch.allclose(got, expected, atol=1e-5)

    bias = torch.randn(1, 3, 10, 10)
    expected = ((q @ k.mT / 2 + bias).masked_fill(~key_mask[:, None, None], float("-inf"))).softmax(-1) @ v
    got = attnzoo.attention(q, k, v, bias=bias, key_mask=key_mask, backend=backend)
    assert torch.allclose(got, expected, atol=1e-5)


def test_attention_accepts_a_configured_backend():
    q, k, v = torch.randn(3, 1, 2, 12, 8)
    got = attnzoo.attention(q, k, v, attnzoo.Causal(), backend=attnzoo.configure("blocked-local", window=4))
    assert torch.allclose(got, attnzoo.attention(q, k, v, attnzoo.Window(3, 0), backend="eager"), atol=1e-6)


def test_attention_drops_whole_weights():
    torch.manual_seed(2)
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 64, 4)
    v = torch.eye(64)[None, None]
    weights = attnzoo.attention(q, k, v, dropout=0.5) * 64 * 0.5  # kept weights are scaled by 1 / (1 - p)
    assert torch.all((weights - weights.round()).abs() < 1e-5)
    assert 10 < int(weights.sum().round()) < 54


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("pattern", [attnzoo.Full(), attnzoo.Window(2, 1)])
def test_a_tensor_that_is_key_and_value_gets_both_gradients(backend, pattern):
    query, states = torch.randn(2, 1, 2, 9, 8, dtype=torch.float64)
    key, value, both = (states.clone().requires_grad_() for _ in range(3))
    apart = attnzoo.attention(query, key, value, pattern, backend="eager").square().sum()
    together = attnzoo.attention(query, both, both, pattern, backend=backend).square().sum()
    (got,) = torch.autograd.grad(together, both)
    torch.testing.assert_close(got, sum(torch.autograd.grad(apart, (key, value))))
