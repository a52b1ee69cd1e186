"""Hashed chunks: the mask equals the definition in plain loops, and the structure covers the mask."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnzoo import InvalidArgumentError
from attnzoo.spec.hashed import HashedChunks, HashRound


def random_round(random, batch, kv_heads, group, q_len, kv_len, length):
    """Return a round with chunks of any lengths, ``length`` on average."""
    keys = torch.rand((batch, kv_heads, kv_len), generator=random).argsort(-1)
    places = torch.randint(0, kv_len, (batch, kv_heads * group, q_len), generator=random)
    begins = torch.rand((batch, kv_len), generator=random) < 1 / length
    begins[:, 0] = False
    return HashRound(keys, keys.argsort(-1), begins.cumsum(1), places.argsort(dim=-1), places)


@st.composite
def cases(draw):
    q_len, kv_len, length = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 5))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    sizes = (batch, kv_heads, group, q_len, kv_len, length)
    pattern = HashedChunks(
        length, draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.booleans()),
        draw(st.integers(0, 2)), draw(st.sampled_from([None, 0, 3])),
        tuple(random_round(random, *sizes) for _ in range(draw(st.integers(1, 3)))),
    )  # fmt: skip
    return pattern, q_len, kv_len


def definition(pattern, q_len, kv_len):
    """Return the definition ``(batch, heads, q_len, kv_len)``, by a loop over the sorted keys of each round."""
    batch, heads = pattern.rounds[0].query_ranks.shape[:2]
    first = kv_len - q_len if pattern.offset is None else pattern.offset

    def is_near(hash_round, b, h, q, k):
        kv_head = h // (heads // hash_round.keys.shape[1])
        order, chunks = hash_round.keys[b, kv_head].tolist(), hash_round.chunks[b].tolist()
        chunk = chunks[hash_round.query_ranks[b, h, q]]
        return chunk - pattern.before <= chunks[order.index(k)] <= chunk + pattern.after

    def sees(b, h, q, k):
        *earlier, current = (is_near(hash_round, b, h, q, k) for hash_round in pattern.rounds)
        distance = first + q - k
        allowed = distance >= pattern.min_distance if pattern.causal else abs(distance) >= pattern.min_distance
        return current and allowed and not any(earlier)

    sizes = (batch, heads, q_len, kv_len)
    return torch.tensor([sees(*index) for index in itertools.product(*map(range, sizes))]).view(sizes)


def mask(pattern, q_len, kv_len):
    b, h = pattern.batch_and_heads(torch.device("cpu"))
    return pattern.mask_mod(q_len, kv_len)(b, h, torch.arange(q_len)[:, None], torch.arange(kv_len))


@given(cases())
def test_the_mask_equals_the_definition(case):
    pattern, q_len, kv_len = case
    batch, heads = pattern.rounds[0].query_ranks.shape[:2]
    pattern.check(batch, heads, q_len, kv_len)
    assert mask(*case).expand(batch, heads, q_len, kv_len).tolist() == definition(*case).tolist()


@pytest.mark.parametrize("causal", [True, False])
def test_a_round_hides_the_keys_of_all_earlier_rounds(causal):
    random = torch.Generator().manual_seed(0)
    rounds = tuple(random_round(random, 2, 1, 2, 9, 12, 4) for _ in range(4))
    pattern = HashedChunks(4, 1, 0, causal, rounds=rounds)
    expected = definition(pattern, 9, 12)
    assert mask(pattern, 9, 12).tolist() == expected.tolist()
    for dropped in range(3):
        fewer = replace(pattern, rounds=rounds[:dropped] + rounds[dropped + 1 :])
        assert (definition(fewer, 9, 12) & ~expected).any(), "each earlier round hides a key that no other hides"


@given(cases(), st.data())
def test_gathered_has_every_visible_key_once(case, data):
    pattern, q_len, kv_len = case
    start = data.draw(st.integers(0, q_len - 1))
    stop = data.draw(st.integers(start + 1, q_len))
    gathered = torch.cat(list(pattern.gathered(start, stop, q_len, kv_len)), dim=2)
    seen = definition(*case)
    for b in range(seen.shape[0]):
        for h in range(seen.shape[1]):
            keys = [key for key in gathered[b, h].tolist() if key >= 0]
            assert len(keys) == len(set(keys))
            queries = pattern.query_order[b, h, start:stop]
            assert set(seen[b, h, queries].any(0).nonzero().flatten().tolist()) <= set(keys)
    own = pattern.rounds[-1].query_chunks().gather(2, pattern.query_order)[:, :, start:stop]
    low, high = own[:, :, :1] - pattern.before, own[:, :, -1:] + pattern.after
    chunks = pattern.rounds[-1].chunks[:, None]
    assert gathered.shape[2] == int(((chunks >= low) & (chunks <= high)).sum(-1).max()), "only the neighbourhood"


def test_gathered_yields_long_runs_in_pieces():
    keys = torch.arange(5000).view(1, 1, -1)
    places, chunks = torch.tensor([0, 4999]).view(1, 1, -1), keys[0] // 64
    pattern = HashedChunks(64, rounds=(HashRound(keys, keys, chunks, torch.arange(2).view(1, 1, -1), places),))
    pieces = list(pattern.gathered(0, 2, 2, 5000))
    assert max(piece.shape[2] for piece in pieces) <= 1024
    assert torch.equal(torch.cat(pieces, dim=2), keys)


def test_a_query_sees_one_chunk_on_each_side_by_default():
    pattern = HashedChunks(5)
    assert (pattern.before, pattern.after, pattern.causal, pattern.min_distance) == (1, 1, False, 0)


def test_equality_and_hash_ignore_the_tensors():
    keys = torch.arange(4).view(1, 1, -1)
    pattern = HashedChunks(2, causal=True, rounds=(HashRound(keys, keys, keys[0] // 2, keys, keys),))
    assert pattern.structure == pattern == HashedChunks(2, causal=True) and hash(pattern.structure) == hash(pattern)
    assert not pattern.structure.rounds and pattern.structure.query_order is None
    assert replace(pattern, offset=5).coarse == HashedChunks(2, causal=True, offset=8)


@pytest.mark.parametrize("name", HashRound.__dataclass_fields__)
def test_check_names_a_tensor_of_the_wrong_shape_or_dtype(name):
    keys = torch.arange(4).view(1, 1, -1)
    good = dict(keys=keys, key_ranks=keys, chunks=keys[0], queries=keys, query_ranks=keys)
    HashedChunks(2, rounds=(HashRound(**good),)).check(1, 1, 4, 4)
    for bad in (good[name].int(), good[name][0], good[name][..., :3]):
        with pytest.raises(InvalidArgumentError, match=rf"(keys|{name}) of the pattern: got .*; allowed: shape \("):
            HashedChunks(2, rounds=(HashRound(**{**good, name: bad}),)).check(1, 1, 4, 4)
    with pytest.raises(InvalidArgumentError, match=r"rounds of the pattern: got \(\)"):
        HashedChunks(2).check(1, 1, 4, 4)


@pytest.mark.parametrize(("heads", "kv_heads", "fits"), [(4, 2, True), (2, 2, True), (3, 2, False), (2, 4, False)])
def test_check_needs_a_multiple_of_the_key_heads(heads, kv_heads, fits):
    keys, queries = torch.arange(4).expand(1, kv_heads, -1), torch.arange(4).expand(1, heads, -1)
    pattern = HashedChunks(2, rounds=(HashRound(keys, keys, keys[:, 0], queries, queries),))
    if fits:
        pattern.check(1, heads, 4, 4)
        return
    with pytest.raises(InvalidArgumentError, match="keys of the pattern: got"):
        pattern.check(1, heads, 4, 4)


def test_check_reads_every_round():
    keys = torch.arange(4).view(1, 1, -1)
    good = HashRound(keys, keys, keys[0], keys, keys)
    for rounds in ((replace(good, queries=keys.int()), good), (good, replace(good, queries=keys.int()))):
        with pytest.raises(InvalidArgumentError, match="queries of the pattern: got"):
            HashedChunks(2, rounds=rounds).check(1, 1, 4, 4)
