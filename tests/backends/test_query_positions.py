"""Approximate backends read the positions of the queries off the masks. The definition is a search in plain loops."""

import itertools

import pytest
import torch

import attnzoo
from attnzoo.backends.approximate.visible_keys import place_queries
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Segment


def attention(mask, key_mask=None, pattern=Full()):
    batch, q_len, kv_len = mask.shape
    query, key = torch.zeros(batch, 1, q_len, 2), torch.zeros(batch, 1, kv_len, 2)
    return Attention(query, (Segment(key, key, pattern, key_mask, mask[:, None]),), 1.0)


def masks(q_len, kv_len):
    """All dense masks of one sample."""
    for bits in itertools.product((False, True), repeat=q_len * kv_len):
        yield torch.tensor(bits).view(1, q_len, kv_len)


def position_by_definition(sees):
    """Return the smallest position at which no query sees a later key, and whether the mask is causal there."""
    batch, q_len, kv_len = sees.shape
    rows = list(itertools.product(range(batch), range(q_len)))
    lasts = {(b, q): max(sees[b, q].nonzero()[:, 0].tolist(), default=None) for b, q in rows}
    seeing = [row for row in rows if lasts[row] is not None]
    if kv_len == q_len:
        return 0, all(lasts[b, q] <= q for b, q in seeing)
    if not seeing:
        return kv_len - q_len, False
    position = max(lasts[b, q] - q for b, q in seeing)
    shown = sees.any(1)
    causal = all(sees[b, q, q + position] for b, q in seeing if 0 <= q + position < kv_len and shown[b, q + position])
    return (position, True) if causal else (kv_len - q_len, False)


def assert_placed(sees, placed):
    """Assert that each query of the attention ``placed`` sees the keys ``sees``, ``(batch, q_len, kv_len)``."""
    _, q_len, kv_len = sees.shape
    position, causal = position_by_definition(sees)
    last_is_hidden = bool(sees.any()) and not bool(sees[:, :, -1].any())
    if q_len != kv_len and not causal and last_is_hidden:
        with pytest.raises(attnzoo.BackendRefusedError, match="key_mask"):
            place_queries("blocked-local", placed)
        return
    placement = place_queries("blocked-local", placed)
    assert (placement.position, placement.causal) == (position, causal), sees
    assert torch.equal(placement.visible, sees.any(1))
    aligned = kv_len - q_len
    assert placement.offset == (None if position == aligned != 0 else position)


@pytest.mark.parametrize(("q_len", "kv_len"), [(2, 3), (2, 4), (3, 2), (2, 2)])
def test_every_small_mask_gives_the_position_of_the_definition(q_len, kv_len):
    for sees in masks(q_len, kv_len):
        assert_placed(sees, attention(sees))


@pytest.mark.parametrize("position", [0, 1, 3, 5])
def test_padding_in_a_static_cache_does_not_move_the_queries(position):
    """Three new tokens at ``position`` of a cache of eight entries. The second sample begins with padding."""
    causal = torch.arange(8) <= position + torch.arange(3)[:, None]
    for padding in range(8):
        key_mask = torch.stack([torch.ones(8), torch.arange(8) >= padding]).bool()
        mask = causal.expand(2, 3, 8)
        assert place_queries("lsh", attention(mask, key_mask)).position == position
        assert_placed(mask & key_mask[:, None], attention(mask, key_mask))
        assert_placed(causal & key_mask[1:, None], attention(causal[None], key_mask[1:]))


@pytest.mark.parametrize("offset", [0, 2, 5])
def test_offset_of_a_causal_pattern_is_the_position(offset):
    placement = place_queries("lsh", attention(torch.ones(1, 3, 8, dtype=torch.bool), pattern=Causal(offset=offset)))
    assert (placement.position, placement.causal, placement.aligned) == (offset, True, 5)
    assert placement.offset == (None if offset == 5 else offset)
