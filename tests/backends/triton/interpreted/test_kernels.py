"""What the conformance kit does not reach: unequal tiles, shares of queries, hidden tiles, and second derivatives."""

from dataclasses import replace

import numpy
import pytest
import torch

import attnzoo
from attnzoo.backends.triton import backward, forward
from attnzoo.backends.triton.tile_sizes import Tile
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.conformance.cases import AttentionCase
from attnzoo.conformance.dropout_check import dropout_failure
from attnzoo.functional import execute
from attnzoo.spec.hashed import HashedChunks, HashRound
from attnzoo.spec.patterns import Causal, Full, SortedChunks, Window

BACKEND = attnzoo.configure("triton")
UNEQUAL = dict(forward=Tile(16, 64), query=Tile(64, 16), key=Tile(32, 16), distance=Tile(16, 32), position=Tile(16, 16))


def rows(*shape):
    return torch.randn(*shape).requires_grad_()


def attention_of(length=50, pattern=Full(), heads=2, kv_heads=1, **more):
    key, value = rows(1, kv_heads, length, 16), rows(1, kv_heads, length, 16)
    return attnzoo.Attention(rows(1, heads, length, 16), (attnzoo.Segment(key, value, pattern, **more),), 0.25)


def assert_agrees(attention):
    report = check_attention("here", attention, BACKEND, grad=True, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, report.checks))


@pytest.fixture
def unequal_tiles(monkeypatch):
    """Another size of tiles in each kernel."""
    monkeypatch.setattr(forward, "tile", lambda kernel, *_: UNEQUAL[kernel])


def test_kernels_may_have_different_tiles(unequal_tiles):
    bias = attnzoo.RelativeBias(rows(2, 31), zero=9)
    assert_agrees(attention_of(length=40, pattern=Window(7, 12), bias=bias))


def test_the_backward_drops_the_weights_that_the_forward_dropped(unequal_tiles):
    assert not dropout_failure(BACKEND, replace(attention_of(length=20, pattern=Causal()), dropout=0.3))


def test_shares_of_queries_add_up(monkeypatch, large_tiles):
    monkeypatch.setattr(backward, "programs_at_once", lambda device: 3)
    monkeypatch.setattr(backward, "_FEWEST_STEPS", 1)
    monkeypatch.setattr(forward, "tile", lambda kernel, *_: Tile(16, 64))
    assert_agrees(attention_of(length=60, heads=2))


@pytest.mark.parametrize("spread", [30.0])
def test_rows_whose_first_tiles_are_hidden(small_tiles, spread):
    """The running maximum must not become the score of a hidden key, because the output would be NaN."""
    attention = attention_of(length=40, key_mask=torch.arange(40)[None] >= 36)
    query = (attention.query.detach() * spread).requires_grad_()
    assert_agrees(replace(attention, query=query))


@pytest.mark.parametrize("lowest", [-1e25, torch.finfo(torch.float32).min])
def test_rows_whose_scores_are_all_far_below_zero(large_tiles, lowest):
    """Models hide keys with the lowest number. A row in which this hides all keys is the mean of all values."""
    values = torch.zeros(1, 1, 20, 20)
    values[:, :, 5:9] = lowest
    values[:, :, 12, 3:] = lowest
    assert_agrees(attention_of(length=20, bias=attnzoo.DenseBias(values)))


def test_scores_may_be_large_in_several_launches(small_tiles):
    """The sum of weights of a row must not be lost beside its largest score."""
    attention = AttentionCase(pattern=SortedChunks(8, 1, 1), grad=False, batch=1, q_len=20, kv_len=20).attention()
    query = torch.zeros_like(attention.query)
    query[..., 0] = 1.0
    shifted = []
    for segment in attention.segments:
        key = torch.zeros_like(segment.key)
        key[..., 0] = -1e25
        shifted.append(replace(segment, key=key))
    attention = replace(attention, query=query, segments=tuple(shifted))
    output = execute(BACKEND, attention).output
    torch.testing.assert_close(output, execute(attnzoo.configure("eager"), attention).output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_round_adds_to_the_gradients_of_the_keys_that_it_sees(small_tiles, causal):
    """Rounds share the keys of all rounds. Some tiles of keys are seen in one round, and some in both."""
    length, rounds = 48, 3
    key, value = rows(1, 2, rounds * length, 16), rows(1, 2, rounds * length, 16)
    orders = [torch.rand(1, 2, length).argsort(-1) for _ in range(rounds)]
    token = torch.cat(orders, dim=2)
    patterns = (SortedChunks(8, 1, 0, causal, number * length, order, token) for number, order in enumerate(orders))
    segments = tuple(attnzoo.Segment(key, value, pattern) for pattern in patterns)
    attention = attnzoo.Attention(rows(1, 2, length, 16), segments, 0.25)
    grad_out = torch.randn(1, 2, length, 16)

    def grads(backend):  # the conformance kit copies the keys of each segment, so its rounds share no keys
        output = execute(attnzoo.configure(backend), attention).output
        return torch.autograd.grad(output, (attention.query, key, value), grad_out)

    torch.testing.assert_close(grads("triton"), grads("eager"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.01, 1.0, 1000.0])
def test_small_and_large_scores_are_capped_exactly(large_tiles, softcap):
    """The formulas of tanh for small and for large arguments are different."""
    bias = attnzoo.RelativeBias(rows(2, 5), zero=2)
    assert_agrees(replace(attention_of(length=20, pattern=Causal(), bias=bias), softcap=softcap))


def test_a_table_of_one_or_two_entries_has_only_ends(large_tiles):
    for size in (1, 2):
        assert_agrees(attention_of(length=20, bias=attnzoo.RelativeBias(rows(2, size), zero=0)))


def test_a_second_derivative_is_refused(large_tiles):
    attention = attention_of(length=5)
    output = execute(BACKEND, attention).output
    with pytest.raises(attnzoo.BackendRefusedError, match="create_graph: got True; allowed: False, because"):
        torch.autograd.grad(output.sum(), attention.query, create_graph=True)


def test_a_mask_that_changes_before_the_backward_is_refused(large_tiles):
    mask = torch.ones(1, 5, dtype=torch.bool)
    output = execute(BACKEND, attention_of(length=5, key_mask=mask)).output
    mask[0, 2] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_layout_of_models_is_read_and_written_without_copies(large_tiles, monkeypatch):
    def refuse(tensor):
        raise AssertionError(f"copied a tensor with strides {tensor.stride()}")

    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    query, key, value = (rows(1, 9, 2, 16).transpose(1, 2) for _ in range(3))
    output = execute(BACKEND, attnzoo.Attention(query, (attnzoo.Segment(key, value),), 0.25)).output
    grads = torch.autograd.grad(output, (query, key, value), torch.ones(1, 9, 2, 16).transpose(1, 2))
    assert all(tensor.transpose(1, 2).is_contiguous() for tensor in (output, *grads))


def test_a_tensor_that_is_key_and_value_gets_both_gradients():
    query, states = rows(1, 2, 20, 16), rows(1, 2, 20, 16)
    segments = (attnzoo.Segment(states, states, Causal()), attnzoo.Segment(states, states, Window(3, 0)))
    for count in (1, 2):
        attention = attnzoo.Attention(query, segments[:count], 0.25)
        (expected,) = torch.autograd.grad(execute(attnzoo.configure("eager"), attention).output.square().sum(), states)
        (got,) = torch.autograd.grad(execute(BACKEND, attention).output.square().sum(), states)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_nan_in_an_early_hash_round_makes_the_row_nan():
    attention = AttentionCase(pattern=SortedChunks(8, 1, 1), grad=False, batch=1, q_len=17, kv_len=17).attention()
    first, second = attention.segments
    key = first.key.clone()
    key[:, :, 3] = float("nan")
    attention = replace(attention, segments=(replace(first, key=key), second))
    expected = execute(attnzoo.configure("eager"), attention).output.isnan()
    assert expected.any()
    assert torch.equal(execute(BACKEND, attention).output.isnan(), expected)


def test_heads_that_share_keys_may_have_many_or_few_queries_near_them(monkeypatch):
    monkeypatch.setattr(forward, "tile", lambda kernel, *_: Tile(16, 16))
    key, value, ranks = rows(1, 1, 40, 16), rows(1, 1, 40, 16), torch.arange(40).repeat(1, 2, 1)
    ranks[0, 1] = 0  # all queries of this head are in the first chunk
    order = torch.arange(40)[None, None]
    hash_round = HashRound(order, order, torch.arange(40)[None] // 4, ranks.argsort(dim=-1, stable=True), ranks)
    segment = attnzoo.Segment(key, value, HashedChunks(4, rounds=(hash_round,)))
    assert_agrees(attnzoo.Attention(rows(1, 2, 40, 16), (segment,), 0.25))


def test_a_number_of_numpy_may_be_the_scale():
    attention = attention_of(length=20)
    given = replace(attention, scale=numpy.float64(0.25))
    assert torch.equal(execute(BACKEND, given).output, execute(BACKEND, attention).output)
