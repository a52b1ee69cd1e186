"""``attnzoo.attention`` with global keys among padding."""

import pytest
import torch

import attnzoo


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("hidden", ["a global key", "all global keys", "all keys of a sample"])
def test_a_global_key_that_is_padding_is_seen_by_no_query(backend, hidden):
    """The window and the global keys are two segments. No key may be visible in both or against its mask."""
    q, k, v = torch.randn(3, 2, 2, 10, 4)
    is_global = torch.zeros(2, 10, dtype=torch.bool)
    is_global[0, [1, 8]] = is_global[1, 4] = True
    real = torch.ones(2, 10, dtype=torch.bool)
    real[0, 8] = False
    if hidden != "a global key":
        real &= ~is_global
    if hidden == "all keys of a sample":
        real[1] = False
    i, j = torch.arange(10)[:, None], torch.arange(10)
    seen = (((j - i).abs() <= 2)[None] | is_global[:, None]) & real[:, None]
    scores = (q @ k.mT / 2).masked_fill(~seen[:, None], float("-inf"))
    expected = scores.softmax(-1).nan_to_num() @ v
    given = dict(pattern=attnzoo.Window(2, 2), key_mask=real, global_keys=is_global, backend=backend)
    torch.testing.assert_close(attnzoo.attention(q, k, v, **given), expected, rtol=1e-5, atol=1e-5)
