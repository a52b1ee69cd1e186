"""Chosen blocks: the definition, the keys that a block gathers, and bad tensors."""

import pytest
import torch

import attnzoo
from attnzoo import Attention, InvalidArgumentError, Segment
from attnzoo.backends.eager import evaluate
from attnzoo.spec.chosen_blocks import ChosenBlocks
from tests.support.compare import is_close


def drawn(q_len=21, kv_len=18, length=4, number=3):
    random = torch.Generator().manual_seed(3)
    shape = (2, 3, -(-q_len // length), number)
    return ChosenBlocks(length, torch.randint(-1, -(-kv_len // length), shape, generator=random)), q_len, kv_len


def mask_of(pattern, q_len, kv_len):
    b, h = pattern.batch_and_heads(torch.device("cpu"))
    return pattern.mask_mod(q_len, kv_len)(b, h, torch.arange(q_len)[:, None], torch.arange(kv_len))


def test_a_query_sees_the_keys_of_the_chosen_blocks():
    pattern, q_len, kv_len = drawn()
    mask = mask_of(pattern, q_len, kv_len)
    for sample, head, query, key in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        chosen = pattern.chosen[sample, head, query // 4].tolist()
        assert bool(mask[sample, head, query, key]) == (key // 4 in chosen)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (4, 8), (20, 21), (5, 7), (0, 21), (3, 9)])
def test_a_block_gathers_each_key_that_its_queries_see_once(start, stop):
    pattern, q_len, kv_len = drawn()
    (keys,) = pattern.gathered(start, stop, q_len, kv_len)
    seen = mask_of(pattern, q_len, kv_len)[:, :, start:stop]
    for sample in range(2):
        for head in range(3):
            expected = seen[sample, head].any(0).nonzero().flatten().tolist()
            found = [key for key in keys[sample, head].tolist() if key >= 0]
            assert sorted(found) == expected
            if pattern.sees_gathered(start, stop):
                assert seen[sample, head].all(0).nonzero().flatten().tolist() == expected
    assert pattern.sees_gathered(start, stop) == (start // 4 == (stop - 1) // 4)


def test_a_query_without_blocks_sees_no_key_and_gets_zeros():
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    chosen = torch.tensor([[[[1], [-1]], [[0], [0]]]])
    attention = Attention(q, (Segment(k, v, ChosenBlocks(4, chosen)),), 0.25)
    for backend in ("eager", "sdpa"):
        output = attnzoo.configure(backend).run(attention).output
        assert not output[0, 0, 4:].any() and output[0, 1, 4:].any()
        assert is_close(output, evaluate(attention).output)


def test_a_key_in_two_segments_counts_twice():
    q, k, v = torch.randn(3, 1, 1, 4, 8)
    segment = Segment(k, v, ChosenBlocks(2, torch.tensor([[[[0], [0]]]])))
    twice = Attention(q, (segment, Segment(k, v)), 1.0)
    doubled = torch.cat([k[:, :, :2], k], dim=2), torch.cat([v[:, :, :2], v], dim=2)
    expected = evaluate(Attention(q, (Segment(*doubled),), 1.0)).output
    for backend in ("eager", "sdpa"):
        assert is_close(attnzoo.configure(backend).run(twice).output, expected)


@pytest.mark.parametrize("length", [0, -1, True, 2.0, "4"])
def test_bad_lengths_raise(length):
    with pytest.raises(InvalidArgumentError, match=r"block length: got .*; allowed: an integer >= 1"):
        ChosenBlocks(length)


@pytest.mark.parametrize(
    "chosen",
    [
        None,
        torch.zeros(1, 2, 2, 1),
        torch.zeros(1, 2, 3, 1).long(),
        torch.zeros(1, 1, 2, 1).long(),
        torch.zeros(2).long(),
    ],
    ids=["none", "floats", "blocks", "heads", "rank"],
)
def test_tensors_that_do_not_fit_raise(chosen):
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    with pytest.raises(InvalidArgumentError, match=r"chosen of the pattern: got .*shape \(1, 2, 2, 'n'\)"):
        Attention(q, (Segment(k, v, ChosenBlocks(4, chosen)),), 0.25)


def test_requests_have_no_tensors():
    pattern, *_ = drawn()
    assert pattern.structure == ChosenBlocks(4) and pattern.structure.chosen is None
    assert hash(pattern.structure) == hash(ChosenBlocks(4))


def test_a_bias_is_refused_by_sdpa_and_computed_by_eager():
    q, k, v = torch.randn(3, 1, 1, 8, 16)
    bias = attnzoo.RelativeBias(torch.randn(1, 3), zero=1)
    attention = Attention(q, (Segment(k, v, ChosenBlocks(4, torch.zeros(1, 1, 2, 1).long()), bias=bias),), 0.25)
    assert not attnzoo.configure("eager").refusals(attention.request())
    (refusal,) = attnzoo.configure("sdpa").refusals(attention.request())
    assert refusal.field == "bias" and "ChosenBlocks" in refusal.got
