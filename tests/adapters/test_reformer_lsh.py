"""Reformer's LSH attention equals the original for the same buckets, and finds the same buckets for a seed."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode

import attnzoo
from attnzoo.adapters import reformer_hashing, reformer_lsh
from attnzoo.adapters.reformer_hashing import HASHED_AT_ONCE, first_largest
from tests.support.reformer import (
    CHUNK,
    NEIGHBOURS,
    assert_module_equals_the_original,
    attentions,
    backends,
    causal,
    hidden,
    lsh,
    padding,
    reformer,
    sides,
)


@backends
@causal
@sides
@pytest.mark.parametrize("hashes", [1, 2, 4])
def test_lsh_equals_the_original_for_its_buckets(is_decoder, backend, side, hashes):
    module = lsh(is_decoder=is_decoder, num_hashes=hashes, lsh_num_chunks_after=0 if is_decoder else 1)
    assert_module_equals_the_original(module, hidden(3, 24), padding(side, 3, 24), backend)


@backends
@causal
@pytest.mark.parametrize("buckets", [2, 8, [2, 4], [4, 2, 2], [4]], ids=str)
def test_lsh_equals_the_original_for_any_number_of_buckets(is_decoder, backend, buckets):
    module = lsh(is_decoder=is_decoder, num_buckets=buckets)
    assert_module_equals_the_original(module, hidden(2, 32), padding("left", 2, 32), backend)


@backends
@causal
@pytest.mark.parametrize("around", NEIGHBOURS, ids=str)
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_lsh_repeats_wrapped_neighbours_as_the_original(is_decoder, backend, around, chunks):
    before, after = around
    module = lsh(is_decoder=is_decoder, num_hashes=1, lsh_num_chunks_before=before, lsh_num_chunks_after=after)
    length = chunks * CHUNK
    assert_module_equals_the_original(module, hidden(2, length), padding("right", 2, length), backend)


@backends
@causal
def test_lsh_chunks_may_straddle_rounds(is_decoder, backend):
    module = lsh(is_decoder=is_decoder, num_hashes=4)
    assert_module_equals_the_original(module, hidden(2, 9), padding("left", 2, 9), backend)


@backends
@causal
@sides
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK])
def test_short_lsh_is_full_attention_without_the_own_token(is_decoder, backend, side, length):
    module = lsh(is_decoder=is_decoder)
    assert_module_equals_the_original(module, hidden(3, length), padding(side, 3, length), backend, buckets=None)


@backends
@causal
def test_lsh_with_one_bucket_and_all_chunks_visible_is_full_attention(is_decoder, backend):
    length = 16
    model = reformer(attn_layers=["lsh"], is_decoder=is_decoder, lsh_attn_chunk_length=8, num_hashes=1)
    module, states = attentions(model)[0], hidden(2, length)
    module.chunk_length, module.num_chunks_before = 8, 1  # both chunks: the whole sequence
    buckets = torch.zeros((2, 3, 1, length), dtype=torch.long)
    with torch.no_grad(), attnzoo.patch(model, backend):
        chunked = module(states, buckets=buckets).hidden_states
        module.chunk_length = length
        whole = module(states).hidden_states
    query = module.query_key(states).unflatten(-1, (3, 8)).transpose(1, 2)
    value = module.value(states).unflatten(-1, (3, 8)).transpose(1, 2)
    scores = query @ torch.nn.functional.normalize(query, dim=-1).transpose(-1, -2)
    hidden_keys = torch.eye(length).bool()
    if is_decoder:
        hidden_keys = torch.ones(length, length).triu().bool()
    weights = scores.masked_fill(hidden_keys, float("-inf")).softmax(-1)
    if is_decoder:
        weights[:, :, 0] = torch.eye(length)[0]
    expected = (weights @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked, expected, rtol=1e-4, atol=1e-4)


# --- some heads at a time


def calls(module, states, buckets, *, at_once, monkeypatch, train=False, grad=False, backend="sdpa", **arguments):
    """Return the output and the number of attentions, with memory for ``at_once`` heads."""
    batch, length = states.shape[:2]
    head = 2 * batch * module.num_hashes * length * module.attention_head_size * states.element_size()
    monkeypatch.setattr(reformer_lsh, "SORTED_AT_ONCE", at_once * head)
    with torch.set_grad_enabled(grad), attnzoo.patch(module.train(train), backend) as handle:
        output = module(states, buckets=buckets, **arguments).hidden_states
    return output, handle.sites[0].calls


@backends
@causal
@sides
@pytest.mark.parametrize("at_once", [0, 1, 2])
def test_some_heads_at_a_time_equal_all_heads_bit_for_bit(monkeypatch, is_decoder, backend, side, at_once):
    module, states = lsh(is_decoder=is_decoder), hidden(2, 32)
    given = dict(monkeypatch=monkeypatch, backend=backend, attention_mask=padding(side, 2, 32))
    with torch.no_grad():
        buckets = module(states).buckets
    expected, whole = calls(module, states, buckets, at_once=3, **given)
    output, several = calls(module, states, buckets, at_once=at_once, **given)
    assert torch.equal(output, expected)
    assert (whole, several) == (1, 3 if at_once < 2 else 2)


def test_all_heads_at_once_with_gradients_dropout_or_probabilities(monkeypatch):
    module, states = lsh(), hidden(2, 32)
    with torch.no_grad():
        buckets = module(states).buckets
    given = dict(at_once=1, monkeypatch=monkeypatch)
    assert calls(module, states, buckets, **given)[1] == 3
    for more in (dict(grad=True), dict(train=True), dict(backend="eager", output_attentions=True)):
        assert calls(module, states, buckets, **more, **given)[1] == 1


def test_sorted_keys_of_all_heads_are_never_in_memory_at_once(monkeypatch):
    """The sorted keys of all heads would be half of the memory of a Reformer at 16384 tokens."""
    module, states, sizes = lsh(num_hashes=8), hidden(1, 512), []

    class Sizes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) and result.is_floating_point() else 0)
            return result

    with torch.no_grad():
        buckets = module(states).buckets
    with Sizes():
        calls(module, states, buckets, at_once=1, monkeypatch=monkeypatch)
    assert max(sizes) <= 8 * 512 * 8, "hashes, tokens, head_size: the rows of one head"


# --- hashing


def assert_same_buckets_and_random_stream(module, states, mask, **arguments):
    twin = copy.deepcopy(module)
    torch.manual_seed(5)
    expected, after = twin(states, attention_mask=mask, **arguments).buckets, torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad(), attnzoo.patch(module, "sdpa"):
        got = module(states, attention_mask=mask, **arguments).buckets
    assert torch.equal(got, expected)
    assert torch.equal(torch.rand(1), after)


SEEDS = [{}, {"num_buckets": [2, 4]}, {"num_buckets": None}, {"hash_seed": None}]
seeds = pytest.mark.parametrize("changes", SEEDS, ids=str)


@seeds
def test_buckets_and_random_stream_equal_the_original_for_a_seed(changes):
    assert_same_buckets_and_random_stream(lsh(**changes), hidden(2, 32), padding("left", 2, 32))


@backends
@pytest.mark.parametrize("hashes", [1, 3, 8])
def test_call_may_set_the_number_of_hashes(backend, hashes):
    module = lsh(num_hashes=2)
    assert_same_buckets_and_random_stream(module, hidden(2, 32), None, num_hashes=hashes)
    assert_module_equals_the_original(module, hidden(2, 32), padding("left", 2, 32), backend, num_hashes=hashes)


@seeds
@pytest.mark.parametrize("side", ["none", "left", "one token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hashing_in_slices_finds_the_same_buckets(changes, side, dtype):
    length = 3 * HASHED_AT_ONCE + 64  # slices whose lengths differ by one
    mask = padding(side, 2, length)
    if side == "one token":  # slices without padding must also count a padding bucket
        mask[1, 5] = 0
    module = lsh(max_position_embeddings=length, lsh_attn_chunk_length=64, **changes).to(dtype)
    assert_same_buckets_and_random_stream(module, hidden(2, length).to(dtype), mask)


@seeds
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hashing_as_on_a_gpu_finds_the_same_buckets(monkeypatch, changes, side, dtype):
    length = 2 * HASHED_AT_ONCE
    monkeypatch.setattr(reformer_hashing, "HASHED_AT_ONCE", length)  # all queries at once
    monkeypatch.setattr(reformer_hashing, "_FirstLargest", lambda: first_largest)
    module = lsh(max_position_embeddings=length, lsh_attn_chunk_length=64, **changes).to(dtype)
    assert_same_buckets_and_random_stream(module, hidden(2, length).to(dtype), padding(side, 2, length))


def test_rotated_queries_are_never_in_memory_at_once():
    module, states = lsh(num_buckets=512), hidden(1, 4 * HASHED_AT_ONCE)
    sizes = []

    class Sizes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with torch.no_grad(), attnzoo.patch(module, "sdpa"), Sizes():
        module(states)
    rotated = 3 * 2 * states.shape[1] * 512  # heads, hashes, tokens, both directions of all rotations
    assert max(sizes) <= rotated // 4


@pytest.mark.parametrize("lengths", [(16, 32), (32, 16), (8,), (64,)], ids=str)
@pytest.mark.parametrize("positions", [64, 4096])
def test_num_buckets_is_derived_from_the_first_input_as_in_the_original(lengths, positions):
    changes = dict(num_buckets=None, max_position_embeddings=positions, lsh_attn_chunk_length=1)
    original, patched = lsh(**changes), lsh(**changes)
    config = copy.deepcopy(vars(patched.config))
    with attnzoo.patch(patched, "sdpa"), torch.no_grad():
        for length in lengths:
            assert torch.equal(patched(hidden(2, length)).buckets, original(hidden(2, length)).buckets)
    assert original.num_buckets is not None
    assert patched.num_buckets is None
    assert vars(patched.config) == config
