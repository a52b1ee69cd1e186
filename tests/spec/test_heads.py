"""Heads are split, merged and expanded in the layout of PyTorch's ``enable_gqa``, as views where possible."""

import pytest
import torch

from attnzoo.spec.heads import expand_heads, merge_heads, split_heads


def test_heads_are_consecutive_parts_of_the_channels():
    states = torch.randn(2, 5, 12)
    split = split_heads(states, 4)
    assert split.shape == (2, 3, 5, 4) and split.data_ptr() == states.data_ptr()
    for head in range(3):
        assert torch.equal(split[:, head], states[:, :, head * 4 : (head + 1) * 4])
    assert torch.equal(merge_heads(split), states)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_neighbouring_query_heads_share_a_key_head(kv_heads):
    tensor = torch.randn(2, kv_heads, 5, 4)
    expanded = expand_heads(tensor, 6)
    assert expanded.shape == (2, 6, 5, 4)
    for head in range(6):
        assert torch.equal(expanded[:, head], tensor[:, head * kv_heads // 6])
    shares_memory = expanded.data_ptr() == tensor.data_ptr()
    assert shares_memory == (kv_heads in (1, 6)), "a copy is needed only between one head and all heads"


def test_gradient_of_a_key_head_is_the_sum_over_its_query_heads():
    tensor, weights = torch.randn(2, 2, 5, 4, requires_grad=True), torch.randn(2, 6, 5, 4)
    (expand_heads(tensor, 6) * weights).sum().backward()
    assert torch.allclose(tensor.grad, weights.unflatten(1, (2, 3)).sum(2))
