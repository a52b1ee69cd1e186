"""Attentions of several internal blocks: more rows, keys, hash chunks and mask entries than are computed at once."""

from dataclasses import replace

import pytest
import torch

from attnzoo.backends.approximate import lsh as lsh_module
from attnzoo.backends.approximate import visible_keys
from attnzoo.backends.approximate.blocked_local import BlockedLocalBackend
from attnzoo.backends.approximate.lsh import LshBackend
from attnzoo.backends.common.blocks import DENSE_ROWS
from attnzoo.backends.sdpa import flash_cpu, math_blocks
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.conformance.random_attention import random_attention
from attnzoo.registry import registry
from attnzoo.spec import hashed
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Segment
from attnzoo.testing import AttentionCase

BATCH, HEADS, DIM, LENGTH = 2, 2, 8, 2 * DENSE_ROWS + 70
RANDOM = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def same_inputs_in_any_order_of_tests():
    RANDOM.manual_seed(1)


def normal(*shape):
    return torch.randn(shape, generator=RANDOM)


def flags(*shape):
    return torch.rand(shape, generator=RANDOM) < 0.5


def trained(*shape):
    return normal(*shape).requires_grad_()


KEY_MASK = flags(BATCH, LENGTH)
KEY_MASK[0, DENSE_ROWS:] = False
POSITIONS = torch.randint(0, LENGTH, (BATCH, LENGTH), generator=RANDOM)
CASES = {
    "dense mask": dict(mask=flags(1, HEADS, LENGTH, LENGTH)),
    "dense mask per sample, causal": dict(mask=flags(BATCH, 1, LENGTH, LENGTH), pattern=Causal()),
    "dense bias": dict(bias=DenseBias(trained(1, HEADS, LENGTH, LENGTH))),
    "dense bias and dense mask": dict(bias=DenseBias(normal(BATCH, 1, LENGTH, LENGTH)), mask=KEY_MASK[:1, None, None]
                                      .expand(-1, -1, LENGTH, -1)),
    "distances beyond both ends": dict(bias=RelativeBias(trained(HEADS, 9), zero=3)),
    "distances beyond both ends, causal": dict(bias=RelativeBias(normal(1, 200), zero=180), pattern=Causal()),
    "all distances": dict(bias=RelativeBias(trained(1, 2 * LENGTH + 5), zero=LENGTH), pattern=Causal()),
    "positions": dict(bias=RelativeBias(trained(HEADS, 300), zero=100, positions=POSITIONS)),
    "positions in a window": dict(bias=RelativeBias(normal(HEADS, 40), zero=9, positions=POSITIONS),
                                  pattern=Window(300, 200)),
    "window": dict(pattern=Window(40, 40)),
    "blocks without keys": dict(pattern=Window(9, 3, LENGTH - 500)),
    "causal window behind its keys": dict(pattern=Window(70, 0, -20)),
    "bias in a window": dict(bias=RelativeBias(trained(HEADS, 60), zero=40), pattern=Window(90, 90)),
    "bias in a shifted window": dict(bias=RelativeBias(trained(HEADS, 60), zero=40), pattern=Window(90, 90, 35)),
    "key mask, causal": dict(key_mask=KEY_MASK, pattern=Causal()),
    "long chunks": dict(pattern=Chunks(DENSE_ROWS + 8, 1, 0, causal=True), key_mask=KEY_MASK),
    "wrapped chunks with a bias": dict(pattern=Chunks(150, 1, 1), bias=RelativeBias(trained(HEADS, 30), zero=20)),
}  # fmt: skip


def attention(value_dim=DIM, **terms):
    query, key = normal(BATCH, HEADS, LENGTH, DIM), normal(BATCH, 1, LENGTH, DIM)
    padding_queries = torch.arange(LENGTH).expand(BATCH, -1) % 5 != 1
    segment = Segment(key, normal(BATCH, 1, LENGTH, value_dim), **terms)
    empty = normal(BATCH, HEADS, LENGTH, value_dim)
    return Attention(query, (segment,), 0.4, query_mask=padding_queries, empty=empty)


def assert_agrees(whole, backend=None, max_rows=128):
    backend = registry.make_backend("sdpa") if backend is None else backend
    report = check_attention("long", whole, backend, grad=True, max_rows=max_rows)
    assert report.ok, "\n".join(map(str, report.checks))
    return report.kernel


@pytest.mark.parametrize("case", CASES)
def test_the_cpu_kernel_agrees_with_the_oracle_on_many_rows(case):
    assert assert_agrees(attention(**CASES[case])) == flash_cpu.KERNEL


@pytest.mark.parametrize("case", CASES)
def test_public_calls_agree_with_the_oracle_on_many_rows(case):
    assert assert_agrees(attention(DIM + 3, **CASES[case])) == "math"


# Sorted and hashed keys


def sorted_or_hashed(pattern, q_len, uneven=False, kv_heads=2, mask="none"):
    return AttentionCase(pattern=pattern, q_len=q_len, kv_len=q_len, kv_heads=kv_heads, uneven=uneven, mask=mask)


@pytest.mark.parametrize("uneven", [False, True], ids=["cpu kernel", "math blocks"])
@pytest.mark.parametrize("masks", ["none", "key mask", "dense mask", "both"])
@pytest.mark.parametrize("pattern", [HashedChunks(20), HashedChunks(13, 1, 0, causal=True)], ids=str)
def test_hashed_keys_in_several_pages_agree_with_the_oracle(monkeypatch, pattern, masks, uneven):
    """A block gathers more keys than fit in a page, and there is more than one block of queries."""
    monkeypatch.setattr(hashed, "_KEYS_AT_ONCE", 24)
    whole = sorted_or_hashed(pattern, 150, uneven).attention()
    terms = {}
    if masks != "dense mask" and masks != "none":
        terms["key_mask"] = flags(whole.batch, 150)
        terms["key_mask"][2] = False
    if masks in ("dense mask", "both"):
        terms["mask"] = flags(whole.batch, whole.heads, 150, 150)
    whole = replace(whole, segments=tuple(replace(segment, **terms) for segment in whole.segments))
    assert assert_agrees(whole, max_rows=ALL_ROWS) == (math_blocks.KERNEL if uneven else flash_cpu.KERNEL)


@pytest.mark.parametrize("uneven", [False, True], ids=["cpu kernel", "math blocks"])
@pytest.mark.parametrize("pattern", [HashedChunks(9), HashedChunks(9, 1, 0, True, 2), SortedChunks(9, 1, 1)], ids=str)
def test_more_than_two_hash_rounds_agree_with_the_oracle(pattern, uneven):
    """Each round hides the keys of all earlier rounds, not only of the first."""
    case = sorted_or_hashed(pattern, 70, uneven)
    request = case.request()
    whole = random_attention(replace(request, segments=request.segments * 2), q_len=70, kv_len=70)
    assert len(whole.segments) == 4
    assert assert_agrees(whole, max_rows=ALL_ROWS) == (math_blocks.KERNEL if uneven else flash_cpu.KERNEL)


@pytest.mark.parametrize("uneven", [False, True], ids=["cpu kernel", "math blocks"])
@pytest.mark.parametrize("masks", ["none", "key mask", "dense mask", "both"])
@pytest.mark.parametrize("pattern", [SortedChunks(12, 1, 1), SortedChunks(17, 1, 0, causal=True)], ids=str)
def test_sorted_keys_with_masks_agree_with_the_oracle(pattern, masks, uneven):
    whole = sorted_or_hashed(pattern, 60, uneven, mask="keys").attention()
    terms = {}
    if masks in ("key mask", "both"):
        terms["key_mask"] = flags(whole.batch, whole.segments[0].kv_len)
        terms["key_mask"][0] = False
    if masks in ("dense mask", "both"):
        terms["mask"] = flags(whole.batch, whole.heads, 60, whole.segments[0].kv_len)
    rounds = [replace(segment, **terms) for segment in whole.segments]
    assert assert_agrees(replace(whole, segments=tuple(rounds)), max_rows=ALL_ROWS)
    first_only = replace(whole, segments=(rounds[0], *whole.segments[1:]))
    second_only = replace(whole, segments=(whole.segments[0], *rounds[1:]))
    for other in (first_only, second_only):
        kernel = assert_agrees(other, max_rows=ALL_ROWS)
        assert kernel == (math_blocks.KERNEL if uneven else flash_cpu.KERNEL)


def test_chunks_of_sorted_keys_longer_than_a_block_agree_with_the_oracle():
    pattern = SortedChunks(DENSE_ROWS + 30, 1, 0, causal=True)
    assert assert_agrees(sorted_or_hashed(pattern, DENSE_ROWS + 70, mask="keys").attention()) == flash_cpu.KERNEL


@pytest.mark.parametrize("uneven", [False, True], ids=["cpu kernel", "math blocks"])
@pytest.mark.parametrize("pattern", [SortedChunks(8, 1, 1), HashedChunks(8)], ids=str)
def test_rounds_of_different_causality_beside_biased_keys_agree_with_the_oracle(pattern, uneven):
    """The hash rounds share tensors but not masks. The other segments are a separate pass."""
    whole = sorted_or_hashed(pattern, 40, uneven).attention()
    first, second = whole.segments
    rounds = (first, replace(second, pattern=replace(second.pattern, causal=True)))
    key, value = normal(3, 4, 40, whole.head_dim), normal(3, 4, 40, whole.value_dim)
    hides = flags(3, 40)
    hides[1] = False
    near = Segment(key, value, Window(3, 2), key_mask=hides, bias=RelativeBias(trained(4, 7), zero=3))
    few = Segment(key[:, :2, :5], value[:, :2, :5], bias=DenseBias(normal(1, 4, 40, 5)))
    for segments in ((*rounds, near), (near, *rounds), (rounds[1], few, rounds[0], near)):
        assert_agrees(replace(whole, segments=segments), max_rows=ALL_ROWS)
    if uneven:
        hidden = replace(near, key_mask=torch.zeros_like(hides), bias=None)
        assert assert_agrees(replace(whole, segments=(hidden, *rounds)), max_rows=ALL_ROWS) == math_blocks.KERNEL


# Masks that approximate backends read in pages

PAGES = {
    "key mask": dict(key_mask=torch.arange(40) >= torch.tensor([[3], [11]])),
    "dense mask": dict(mask=(torch.arange(40) <= torch.arange(40)[:, None]) & flags(2, 1, 40, 40)),
    "dense mask of one sample": dict(mask=(torch.arange(40) <= torch.arange(40)[:, None])[None, None]
                                     & (torch.arange(40) % 7 != 2)),
    "both": dict(mask=flags(1, 4, 40, 40), key_mask=flags(2, 40)),
    "dense mask, causal": dict(mask=flags(2, 1, 40, 40), pattern=Causal()),
}  # fmt: skip
BACKENDS = {
    "sinks": BlockedLocalBackend(window=4, sinks=3, inner="eager"),
    "lsh": LshBackend(num_hashes=2, chunk_length=5, num_buckets=4, inner="eager"),
}


@pytest.mark.parametrize("case", PAGES)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("entries", [1, 2 * 4 * 40 * 3, 2 * 40 * 7])
def test_pages_do_not_change_what_approximate_backends_see(monkeypatch, backend, case, entries):
    random = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, heads, 40, 8, generator=random).double() for heads in (4, 2, 2))
    terms = {"pattern": Full(), **PAGES[case]}
    whole = Attention(query, (Segment(key, value, **terms),), 0.4)
    expected = backend.run(whole).output
    monkeypatch.setattr(visible_keys, "_ENTRIES_AT_ONCE", entries)
    monkeypatch.setattr(lsh_module, "_ROWS_AT_ONCE", 7)
    assert torch.equal(backend.run(whole).output, expected)
