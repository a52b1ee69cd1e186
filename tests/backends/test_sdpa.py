"""``sdpa``: single calls."""

import pytest
import torch

import attnzoo
from attnzoo.conformance.attention_check import check_attention
from attnzoo.registry import registry


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("pattern", [attnzoo.Full(), attnzoo.Causal(), attnzoo.Window(3, 2)], ids=str)
def test_the_scale_may_be_zero_or_negative(pattern, scale):
    """The CPU kernel hides later keys by -inf before it scales."""
    query, key, value = (torch.randn(2, 3, 9, 8) for _ in range(3))
    whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, pattern),), scale)
    report = check_attention("case", whole, registry.make_backend("sdpa"), grad=True)
    assert report.ok, report
