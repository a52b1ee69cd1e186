"""The kit has cases of every kind, in the dtypes that were asked for, and no others."""

import itertools
from dataclasses import replace

import pytest
import torch

from attnzoo import testing
from attnzoo.conformance.cases import BIASES, MASKS, PATTERNS, AttentionCase, RequestCase, shrink
from attnzoo.conformance.transform_check import CHECKED_TRANSFORMS
from attnzoo.spec.chosen_blocks import ChosenBlocks
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Request, SegmentRequest

F32 = torch.float32
CASES = tuple(testing.cases((F32,)))
DENSE = [pattern for pattern in PATTERNS if not isinstance(pattern, SortedChunks)]


def has(**terms):
    return any(all(getattr(case, name) == value for name, value in terms.items()) for case in CASES)


def test_kinds_of_terms_are_those_of_the_documentation():
    assert MASKS == ("none", "keys", "dense", "globals")
    assert BIASES == ("none", "relative", "dense", "trained relative", "trained dense")
    assert {case.mask for case in CASES} == {*MASKS, "queries"}
    assert {case.bias for case in CASES} == {*BIASES}
    assert {case.transform for case in CASES} == {"", *CHECKED_TRANSFORMS}
    assert {case.kv_heads for case in CASES} == {1, 2, 4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cases_have_the_requested_dtype(dtype):
    assert {case.dtype for case in testing.cases((dtype,))} == {dtype}
    assert {case.q_len for case in testing.cases((dtype,))} == (
        {1, 5, 23, 37, 530} if dtype in (F32, torch.bfloat16) else {1, 5, 23, 37}
    )


def test_every_dense_pattern_has_every_mask_and_every_bias():
    for pattern, mask, bias in itertools.product(DENSE, MASKS, BIASES):
        combined = mask == "globals" and bias != "none"
        for kv_heads, grad in ((4, True), (1, False)):
            assert has(pattern=pattern, mask=mask, bias=bias, kv_heads=kv_heads, grad=grad, q_len=37) != combined


def test_sorted_and_hashed_keys_have_padding_and_relative_biases():
    for pattern in set(PATTERNS) - set(DENSE):
        for mask, bias in itertools.product(("none", "keys"), ("none", "relative", "trained relative")):
            assert has(pattern=pattern, mask=mask, bias=bias)
    hashed = {case.pattern for case in CASES if isinstance(case.pattern, HashedChunks)}
    assert any(pattern.causal for pattern in hashed) and any(pattern.min_distance > 1 for pattern in hashed)
    for mask in ("none", "keys", "dense"):
        assert any(case.mask == mask and case.pattern in hashed for case in CASES)
    assert any(case.bias == "trained relative" and case.pattern in hashed for case in CASES)


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(5, 3)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_simple_patterns_have_every_length_and_option(pattern, mask):
    base = dict(pattern=pattern, mask=mask)
    for q_len, kv_len, batch in ((5, 23, 3), (1, 1, 3), (1, 23, 1), (23, 9, 3)):
        assert has(**base, q_len=q_len, kv_len=kv_len, batch=batch, kv_heads=2)
    for option in (
        *(dict(dropout=0.25, grad=True), dict(dropout=0.25, probabilities=True), dict(uneven=True)),
        *(dict(strided=True), dict(dropout=0.0, probabilities=True)),
    ):
        assert has(**base, **option)


def test_backends_without_gqa_have_every_length_and_offset():
    """With equal lengths, ``offset=0`` and ``offset=None`` show the same keys."""
    for pattern in (Full(), Causal(), Causal(offset=0), Window(5, 3), Window(5, 3, offset=0)):
        for q_len, kv_len in ((5, 23), (1, 23), (23, 9)):
            assert has(pattern=pattern, mask="none", bias="none", kv_heads=4, q_len=q_len, kv_len=kv_len)
    for pattern in (Causal(offset=7), Window(5, 3, offset=7)):
        assert has(pattern=pattern, kv_heads=4, q_len=5, kv_len=23)
    for kind in (HashedChunks, ChosenBlocks):
        assert any(isinstance(case.pattern, kind) and (case.kv_heads, case.q_len) == (4, 5) for case in CASES)
    for mask, bias in (("keys", "none"), ("dense", "none"), ("none", "relative"), ("none", "dense")):
        assert has(pattern=Causal(), mask=mask, bias=bias, kv_heads=4, q_len=5, kv_len=23)


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(5, 3)], ids=str)
def test_simple_patterns_have_other_shapes_empty_rows_and_padding_queries(pattern):
    assert has(pattern=pattern, mask="queries", bias="none")
    assert has(pattern=pattern, mask="dense", other_shapes=True)
    assert has(pattern=pattern, mask="keys", empty=True, grad=True)
    assert has(pattern=pattern, mask="dense", empty=True, grad=False)
    for bias in ("trained relative", "trained dense"):
        assert has(pattern=pattern, bias=bias, q_len=5, kv_len=23, kv_heads=2)
        assert has(pattern=pattern, bias=bias, other_shapes=True)
        assert has(pattern=pattern, bias=bias, mask="queries")


def test_masks_of_equal_requests_differ():
    for pattern, mask in itertools.product(DENSE, ("keys", "dense")):
        assert has(pattern=pattern, mask=mask, reversed=True)


def test_long_cases_have_every_pattern_and_the_terms_past_a_block():
    for pattern in PATTERNS:
        assert has(pattern=pattern, q_len=530, kv_len=530, batch=2)
    assert has(q_len=530, mask="globals") and has(q_len=530, mask="keys") and has(q_len=530, mask="dense")
    assert has(q_len=530, bias="trained relative") and has(q_len=530, bias="trained dense")


@pytest.mark.parametrize("transform", CHECKED_TRANSFORMS)
def test_transforms_have_every_mask_and_bias(transform):
    for pattern, mask in itertools.product((Full(), Causal(offset=0), Window(5, 3), Chunks(8, 1, 1)), MASKS):
        assert has(transform=transform, pattern=pattern, mask=mask)
    for mask in MASKS:
        assert has(transform=transform, mask=mask, q_len=5, kv_len=23)
    for bias in ("relative", "trained relative", "trained dense"):
        assert has(transform=transform, bias=bias, mask="keys")
    assert has(transform=transform, pattern=SortedChunks(8, 1, 0, causal=True), mask="keys")


def test_text_of_a_case_names_what_distinguishes_the_case():
    assert len({str(case) for case in CASES}) == len(set(CASES))
    case = AttentionCase(F32, Causal(), "keys", "trained dense", 2, 5, 23, dropout=0.25, transform="vmap")
    assert str(case) == (
        "float32, Causal(offset=None), mask keys, bias trained dense, 4/2 heads, 5 x 23, batch 3, grad, dropout, "
        "under vmap"
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.q_len < 100][::7], ids=str)
def test_attention_of_a_case_has_the_request_and_the_sizes_of_the_case(case):
    attention, request = case.attention(), case.request()
    if isinstance(case.pattern, SortedChunks):  # each round has its range of ranks
        first, second = request.segments
        second = replace(second, pattern=replace(second.pattern, start=case.q_len))
        request = replace(request, segments=(first, second))
    assert attention.request(case.probabilities) == request
    assert (attention.batch, attention.q_len) == (case.batch, case.q_len)
    assert attention.value_dim == (20 if case.uneven else 16) and attention.dropout == case.dropout
    assert attention.query.requires_grad == case.grad
    assert (attention.query.stride(-1) != 1) == case.strided
    assert (attention.query_mask is not None) == (case.mask in ("globals", "queries"))
    if not isinstance(case.pattern, SortedChunks | HashedChunks):
        assert attention.segments[0].kv_len == case.kv_len
        assert (attention.empty is not None) == case.empty


def test_reversed_case_has_the_masks_of_the_other_samples():
    for mask in ("keys", "dense", "globals"):
        straight, other = (AttentionCase(mask=mask, reversed=flag).attention() for flag in (False, True))
        assert torch.equal(straight.query, other.query)
        for a, b in zip(straight.segments, other.segments, strict=True):
            for field in ("key_mask", "mask"):
                given, flipped = getattr(a, field), getattr(b, field)
                assert (given is None) == (flipped is None)
                assert given is None or torch.equal(given.flip(0), flipped)
        if mask == "globals":
            assert torch.equal(straight.query_mask.flip(0), other.query_mask)


def request(pattern, kv_heads=8, value_dim=64, key_mask=False):
    return Request("cpu", F32, 8, 64, value_dim, (SegmentRequest(pattern, kv_heads, key_mask=key_mask),))


def test_case_of_a_request_has_fewer_keys_in_cross_attention():
    for pattern, keys in ((Full(cross=True), 25), (Full(), 37), (Causal(), 37)):
        for key_mask in (False, True):
            attention = RequestCase(shrink(request(pattern, key_mask=key_mask))).attention()
            assert (attention.q_len, attention.segments[0].kv_len) == (37, keys)
            assert (attention.query_mask is not None) == key_mask


@pytest.mark.parametrize(("kv_heads", "expected"), [(8, 4), (4, 2), (2, 1), (1, 1)])
def test_small_request_keeps_the_ratio_of_the_heads(kv_heads, expected):
    small = shrink(request(Causal(), kv_heads))
    assert (small.heads, small.segments[0].kv_heads, small.head_dim, small.value_dim) == (4, expected, 16, 16)
    assert shrink(request(Causal(), value_dim=32)).value_dim == 24, "kernels need multiples of 8"


@pytest.mark.parametrize(
    ("pattern", "small"),
    [
        (Window(512, 256), Window(7, 5)),
        (Window(3, 0), Window(3, 0)),
        (Window(512, 0, 1), Window(7, 0, 1)),
        (Chunks(64, 1, 0, causal=True), Chunks(8, 1, 0, causal=True)),
        (Chunks(4, 1, 1), Chunks(4, 1, 1)),
        (Full(), Full()),
    ],
    ids=str,
)
def test_small_request_has_narrower_windows_and_shorter_chunks(pattern, small):
    assert shrink(request(pattern)).segments[0].pattern == small
