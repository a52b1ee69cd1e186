"""Additive masks by token agree with the pattern."""

import pytest
import torch

from attnzoo.backends.common.additive_masks import TokenMasks
from attnzoo.spec.patterns import SortedChunks


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("hidden", [0, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_token_masks_agree_with_the_pattern(causal, hidden, dtype):
    token = torch.rand(2, 3, 9).argsort(-1).repeat(1, 1, 2)
    token = token.masked_fill(token < hidden, -1)
    masks, pattern = TokenMasks(token, causal, dtype), SortedChunks(4, causal=causal)
    for start, stop in ((0, 18), (3, 5), (2, 3)):
        queries = torch.rand(2, 3, 9).argsort(-1)[:, :, :5]
        mask, visible_rows = masks.of(queries, start, stop)
        visible = pattern.visible(queries[..., None], token[:, :, None, start:stop])
        assert mask.dtype == dtype
        assert torch.equal(mask == 0, visible)
        assert (mask[~visible].double() < -1e29).all()
        rows = torch.ones_like(queries, dtype=torch.bool) if visible_rows is None else visible_rows
        assert torch.equal(visible.any(-1), rows)
