"""Each pattern agrees with its definition in plain loops, and its structure with its mask."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo import Causal, Chunks, Full, InvalidArgumentError, Window
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Pattern, SortedChunks, Tile, power_of_two

LONG = os.environ.get("ATTNZOO_HYPOTHESIS_PROFILE") == "long"
some = settings(max_examples=settings().max_examples if LONG else 150, deadline=None)


# The definitions, independent of the code under test


def definition(pattern: Pattern, q_len: int, kv_len: int) -> list[list[bool]]:
    return [[sees(pattern, i, j, q_len, kv_len) for j in range(kv_len)] for i in range(q_len)]


def sees(pattern: Pattern, i: int, j: int, q_len: int, kv_len: int) -> bool:
    if isinstance(pattern, Full):
        return True
    if isinstance(pattern, Chunks):
        chunks = -(-kv_len // pattern.length)
        neighbours = {(i // pattern.length + step) % chunks for step in range(-pattern.before, pattern.after + 1)}
        return j // pattern.length in neighbours and (j <= i or not pattern.causal)
    position = i + (kv_len - q_len if pattern.offset is None else pattern.offset)
    if isinstance(pattern, Causal):
        return j <= position
    return -pattern.left <= j - position <= pattern.right


def mask(pattern: Pattern, q_len: int, kv_len: int) -> torch.Tensor:
    zero = torch.zeros(1, 1, dtype=torch.long)
    q, kv = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
    return pattern.mask_mod(q_len, kv_len)(zero, zero, q, kv).expand(q_len, kv_len)


offsets = st.none() | st.integers(-8, 12)
lengths = st.integers(1, 14)
sides = st.integers(0, 9)
aligned = (
    st.builds(Full)
    | st.builds(Causal, offsets)
    | st.tuples(sides, sides).filter(any).flatmap(lambda s: st.builds(Window, st.just(s[0]), st.just(s[1]), offsets))
)
reaches = st.tuples(st.integers(-3, 4), st.integers(-3, 4)).filter(lambda reach: sum(reach) >= 0)
chunked = st.tuples(st.integers(1, 6), reaches, st.booleans()).map(lambda c: Chunks(c[0], *c[1], c[2]))
cases = st.tuples(aligned, lengths, lengths) | st.tuples(chunked, lengths).map(lambda c: (c[0], c[1], c[1]))


def blocks_of(draw, length: int) -> tuple[int, int]:
    start = draw(st.integers(0, length - 1))
    return start, draw(st.integers(start + 1, length))


@some
@given(cases)
def test_the_mask_agrees_with_the_definition(case):
    pattern, q_len, kv_len = case
    assert mask(pattern, q_len, kv_len).tolist() == definition(pattern, q_len, kv_len)


@some
@given(aligned, lengths, lengths)
def test_a_band_agrees_with_the_definition(pattern, q_len, kv_len):
    lowest, highest = pattern.band(q_len, kv_len)
    distance = torch.arange(kv_len) - torch.arange(q_len)[:, None]
    visible = (distance >= lowest) & (distance <= highest)
    assert visible.tolist() == definition(pattern, q_len, kv_len)


def test_chunks_are_no_band():
    assert Chunks(4).band(8, 8) is None


@some
@given(cases, st.data())
def test_spans_contain_every_visible_key_in_order_and_once(case, data):
    pattern, q_len, kv_len = case
    start, stop = blocks_of(data.draw, q_len)
    spans = pattern.kv_spans(start, stop, q_len, kv_len)
    flat = [edge for span in spans for edge in span]
    assert all(0 <= low < high <= kv_len for low, high in spans)
    assert all(high < low for (_, high), (low, _) in pairwise(spans)), "disjoint, sorted, joined"
    assert flat == sorted(flat)
    covered = {key for low, high in spans for key in range(low, high)}
    visible = {j for i in range(start, stop) for j in range(kv_len) if sees(pattern, i, j, q_len, kv_len)}
    assert visible <= covered


@some
@given(cases, st.data())
def test_spans_of_a_local_pattern_are_short(case, data):
    """The number of keys of a block depends on the block and the pattern, not on the length."""
    pattern, q_len, kv_len = case
    start, stop = blocks_of(data.draw, q_len)
    covered = sum(high - low for low, high in pattern.kv_spans(start, stop, q_len, kv_len))
    if isinstance(pattern, Window):
        assert covered <= stop - start + pattern.left + pattern.right
    if isinstance(pattern, Chunks):
        chunks = (stop - 1) // pattern.length - start // pattern.length + 1 + pattern.before + pattern.after
        assert covered <= chunks * pattern.length


@some
@given(cases, st.data())
def test_sees_all_is_never_wrong(case, data):
    pattern, q_len, kv_len = case
    q_start, q_stop = blocks_of(data.draw, q_len)
    kv_start, kv_stop = blocks_of(data.draw, kv_len)
    if pattern.sees_all(Tile(q_start, q_stop, kv_start, kv_stop, q_len, kv_len)):
        assert mask(pattern, q_len, kv_len)[q_start:q_stop, kv_start:kv_stop].all()


@some
@given(cases, st.data())
def test_blocks_of_equal_key_have_equal_masks(case, data):
    pattern, q_len, kv_len = case
    whole, seen = mask(pattern, q_len, kv_len), {}
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    for q_start in range(0, q_len, rows):
        for kv_start in range(0, kv_len, columns):
            q_stop, kv_stop = min(q_len, q_start + rows), min(kv_len, kv_start + columns)
            key = pattern.block_key(Tile(q_start, q_stop, kv_start, kv_stop, q_len, kv_len))
            block = whole[q_start:q_stop, kv_start:kv_stop]
            if key is not None:
                assert torch.equal(seen.setdefault(key, block), block)


@pytest.mark.parametrize("kv_len", [7, 9], ids=["partial last chunk", "full chunks"])
@pytest.mark.parametrize("around", [(1, 1), (2, 0), (0, 2), (3, 1), (-1, 3)], ids=str)
def test_a_neighbourhood_of_all_chunks_hides_no_key(around, kv_len):
    """``sees_all`` must be True here, because kernels build a mask for every other block."""
    pattern, whole = Chunks(3, *around), Tile(0, kv_len, 0, kv_len, kv_len, kv_len)
    assert pattern.sees_all(whole) and pattern.block_key(whole) is not None
    causal = Chunks(3, *around, causal=True)
    assert not causal.sees_all(whole) and causal.block_key(whole) is not None, "only later keys are hidden"
    assert not Chunks(3, 1, 0).sees_all(whole)


def test_masks_of_a_sliding_window_are_reused():
    window = Window(3, 2)
    keys = {window.block_key(Tile(q, q + 4, q - 3, q + 6, 64, 64)) for q in range(4, 56, 4)}
    assert len(keys) == 1


@some
@given(cases)
def test_block_sizes_fit(case):
    pattern, q_len, kv_len = case
    assert 1 <= pattern.block_size(q_len, kv_len) <= q_len


# Alignment and wrapping


def rows(pattern: Pattern, q_len: int, kv_len: int) -> list[str]:
    return ["".join("#" if seen else "." for seen in row) for row in mask(pattern, q_len, kv_len).tolist()]


def test_new_tokens_see_the_whole_cache():
    assert rows(Causal(), 2, 5) == ["####.", "#####"]
    assert rows(Causal(offset=0), 2, 5) == ["#....", "##..."]
    assert rows(Window(1, 0), 2, 5) == ["..##.", "...##"]


def test_with_more_queries_than_keys_some_rows_see_no_key():
    assert rows(Causal(), 4, 2) == ["..", "..", "#.", "##"]
    assert Causal().kv_spans(0, 2, 4, 2) == ()


def test_chunks_wrap_around_with_a_partial_last_chunk():
    assert rows(Chunks(2, before=1, after=0), 5, 5) == ["##..#", "##..#", "####.", "####.", "..###"]
    assert rows(Chunks(2, before=0, after=1), 5, 5) == ["####.", "####.", "..###", "..###", "##..#"]
    assert Chunks(2).kv_spans(0, 2, 5, 5) == ((0, 2), (4, 5))
    assert Chunks(2, after=1).kv_spans(4, 5, 5, 5) == ((0, 5),)


def test_causal_chunks_do_not_wrap():
    assert rows(Chunks(2, before=1, causal=True), 5, 5) == ["#....", "##...", "###..", "####.", "..###"]


def test_a_neighbourhood_wider_than_the_sequence_sees_each_key_once():
    assert rows(Chunks(2, before=5, after=5), 5, 5) == ["#####"] * 5
    assert Chunks(2, before=5, after=5).kv_spans(2, 4, 5, 5) == ((0, 5),)
    assert rows(Chunks(9), 4, 4) == ["####"] * 4


def test_chunks_need_as_many_queries_as_keys():
    with pytest.raises(InvalidArgumentError, match=r"Chunks\(.*with 3 queries and 4 keys; allowed: as many queries as"):
        Chunks(2).check(1, 1, 3, 4)


def test_chunks_may_see_only_their_neighbours():
    assert rows(Chunks(2, before=-1, after=1), 6, 6) == ["..##..", "..##..", "....##", "....##", "##....", "##...."]


# Sorted chunks: keys stand in sorted order, round after round, and each query has a place in its round


@st.composite
def sorted_cases(draw):
    q_len, rounds, batch, heads = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 2)), 2
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def permutations():
        places = torch.stack([torch.randperm(q_len, generator=generator) for _ in range(batch * heads)])
        return places.view(batch, heads, q_len)

    orders = [permutations() for _ in range(rounds)]
    token = torch.cat(orders, dim=-1)
    token = token.masked_fill(torch.rand(token.shape, generator=generator) < 0.2, -1)
    number = draw(st.integers(0, rounds - 1))
    reach = draw(reaches)
    pattern = SortedChunks(
        draw(st.integers(1, 5)), *reach, draw(st.booleans()), start=number * q_len, order=orders[number], token=token
    )
    return pattern, q_len, q_len * rounds


@some
@given(sorted_cases(), st.data())
def test_sorted_chunks_agree_with_the_definition(case, data):
    pattern, q_len, kv_len = case
    pattern.check(*pattern.order.shape[:2], q_len, kv_len)
    batch, heads = pattern.order.shape[:2]
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    got = pattern.mask_mod(q_len, kv_len)(b, h, torch.arange(q_len)[:, None], torch.arange(kv_len))
    got = got.expand(batch, heads, q_len, kv_len)
    chunks = -(-kv_len // pattern.length)
    start, stop = blocks_of(data.draw, q_len)
    spans = pattern.kv_spans(start, stop, q_len, kv_len)
    covered = {key for low, high in spans for key in range(low, high)}
    assert not pattern.sees_all(Tile(start, stop, 0, kv_len, q_len, kv_len))
    for sample in range(batch):
        for head in range(heads):
            for place, query in enumerate(pattern.order[sample, head].tolist()):
                chunk = (pattern.start + place) // pattern.length
                near = {(chunk + step) % chunks for step in range(-pattern.before, pattern.after + 1)}
                tokens = pattern.token[sample, head].tolist()
                expected = [
                    key // pattern.length in near
                    and token >= 0
                    and (token < query if pattern.causal else token != query)
                    for key, token in enumerate(tokens)
                ]
                assert got[sample, head, query].tolist() == expected
                if start <= place < stop:
                    assert {key for key, seen in enumerate(expected) if seen} <= covered


@pytest.mark.parametrize("name", ["order", "token"])
def test_sorted_chunks_need_order_and_token(name):
    good = dict(order=torch.arange(4)[None, None], token=torch.arange(4)[None, None])
    SortedChunks(2, **good).check(1, 1, 4, 4)
    for bad in (None, good[name].int(), good[name][0], good[name][..., :3]):
        with pytest.raises(InvalidArgumentError, match=rf"{name} of the pattern: got .*; allowed: shape \(1, 1, 4\), "):
            SortedChunks(2, **{**good, name: bad}).check(1, 1, 4, 4)


# Bad arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0, 0), r"window: got left=0, right=0; allowed: a window > 0"),
        (lambda: Window(-1, 3), r"window left: got -1; allowed: an integer >= 0"),
        (lambda: Window(3, -2), r"window right: got -2; allowed: an integer >= 0"),
        (lambda: Window(1.5, 0), r"window left: got 1\.5; allowed: an integer"),
        (lambda: Window(True, 0), r"window left: got True; allowed: an integer"),
        (lambda: Window(None, 4), r"window left: got None"),
        (lambda: Window(2, 0, "x"), r"offset of Window: got 'x'; allowed: an integer or None"),
        (lambda: Causal("x"), r"offset of Causal: got 'x'; allowed: an integer or None"),
        (lambda: Causal(1.0), r"offset of Causal: got 1\.0"),
        (lambda: Causal(True), r"offset of Causal: got True"),
        (lambda: Chunks(0), r"chunk length: got 0; allowed: an integer >= 1"),
        (lambda: Chunks(4, before=-1), r"chunks before.*: got -1; allowed: an integer >= 0"),
        (lambda: Chunks(4, before=1, after=-2), r"chunks .*after: got -1; allowed: an integer >= 0"),
        (lambda: Chunks(4, after="1"), r"chunks .*after: got '1'; allowed: an integer"),
        (lambda: Chunks(4, before=1.0), r"chunks before.*: got .*1\.0; allowed: an integer"),
    ],
)
def test_bad_sizes_name_what_is_allowed(make, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make()


def test_patterns_are_values():
    assert Window(2, 3) == Window(2, 3)
    assert len({Window(2, 3), Window(2, 3), Causal(), Causal(0), Full(), Chunks(4), Chunks(4, causal=True)}) == 6
    with pytest.raises(AttributeError):
        Window(2, 3).left = 4


# Coarse patterns, which identify measurements


@pytest.mark.parametrize(
    ("count", "rounded"),
    [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1024, 1024), (1025, 2048), (-1, -1), (-5, -8)],
)
def test_power_of_two_rounds_the_magnitude_up(count, rounded):
    assert power_of_two(count) == rounded


@pytest.mark.parametrize(
    ("pattern", "coarse"),
    [
        (Full(cross=True), Full()),
        (Causal(), Causal()),
        (Causal(700), Causal(1024)),
        (Causal(-5), Causal(-8)),
        (Window(3, 2, 9), Window(3, 2, 16)),
        (Window(3, 2), Window(3, 2)),
        (Chunks(6, 1, 1, True), Chunks(6, 1, 1, True)),
        (HashedChunks(6, offset=9), HashedChunks(6, offset=16)),
        (HashedChunks(6), HashedChunks(6)),
        (SortedChunks(6, start=600), SortedChunks(6, start=1024)),
        (SortedChunks(6, start=600, order=torch.zeros(1), token=torch.zeros(1)), SortedChunks(6, start=1024)),
    ],
    ids=str,
)
def test_coarse_rounds_offsets_and_starts_and_drops_tensors(pattern, coarse):
    got = pattern.coarse
    assert got == coarse and type(got) is type(coarse)
    assert all(getattr(got, name, None) is None for name in ("order", "token"))
