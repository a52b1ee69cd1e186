"""Packed kernels with sorted chunks, grouped key heads, wrap-around and masks per sample, on fake kernels."""

from dataclasses import replace

import pytest
import torch

from attnzoo.backends.varlen import calls
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.backends.varlen.xformers import XformersBackend
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Segment
from attnzoo.testing import AttentionCase
from tests.support.half import HALF, agrees, heads

KERNELS = {
    "flash_attn": FlashBackend(kernel="flash_attn"),
    "varlen": FlashBackend(kernel="varlen"),
    "xformers_flash": XformersBackend(kernel="xformers_flash"),
    "xformers_cutlass": XformersBackend(kernel="xformers_cutlass"),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
pytestmark = pytest.mark.usefixtures("flash_attn", "varlen", "xformers")
PLACES = torch.arange(20)


def assert_agrees(kernel, whole):
    assert agrees(whole, KERNELS[kernel]) == kernel


# Sorted chunks

TOKENS = 18
# (3, 2 * TOKENS): another mask for each sample, over the keys of both rounds
PER_SAMPLE = torch.stack([torch.arange(2 * TOKENS) % 3 != 1, torch.arange(2 * TOKENS) > 20, torch.arange(36) != 5])
KEY_MASKS = {
    "per sample": PER_SAMPLE,
    "one sample hidden": PER_SAMPLE & torch.tensor([[True], [False], [True]]),
    "other samples": PER_SAMPLE.flip(0),
}


def rounds(pattern, kv_heads=4, padded=False):
    mask = "keys" if padded else "none"
    return AttentionCase(HALF, pattern, mask, kv_heads=kv_heads, q_len=TOKENS, kv_len=TOKENS).attention()


@every_kernel
@pytest.mark.parametrize("key_mask", KEY_MASKS.values(), ids=KEY_MASKS)
@pytest.mark.parametrize("where", ["both rounds", "second round"])
@pytest.mark.parametrize("pattern", [SortedChunks(5, 1, 1), SortedChunks(4, 1, 0, causal=True)], ids=str)
def test_sorted_chunks_have_a_key_mask_per_sample(kernel, pattern, where, key_mask):
    whole = rounds(pattern, padded=True)
    first, second = (replace(segment, key_mask=key_mask) for segment in whole.segments)
    first = first if where == "both rounds" else whole.segments[0]
    assert_agrees(kernel, replace(whole, segments=(first, second)))


@every_kernel
def test_sorted_chunks_have_padding_queries_per_sample(kernel):
    query_mask = torch.stack([torch.arange(TOKENS) % 2 == 0, torch.arange(TOKENS) > 9, torch.arange(TOKENS) < 4])
    assert_agrees(kernel, replace(rounds(SortedChunks(5, 1, 1)), query_mask=query_mask))


@every_kernel
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_sorted_chunks_have_grouped_key_heads(kernel, kv_heads):
    """Query heads that share a key head may sort the tokens differently."""
    whole = rounds(SortedChunks(5, 1, 0))
    order = torch.rand(3, 4, TOKENS).argsort(-1)
    segment = whole.segments[0]
    token = torch.cat([order, order], dim=2)
    key, value = (tensor[:, :kv_heads].contiguous() for tensor in (segment.key, segment.value))
    pattern = replace(segment.pattern, order=order, token=token)
    segments = tuple(
        replace(segment, key=key, value=value, pattern=replace(pattern, start=start)) for start in (0, TOKENS)
    )
    assert_agrees(kernel, replace(whole, segments=segments))


@every_kernel
def test_sorted_chunks_of_uneven_value_dim_agree(kernel):
    whole = rounds(SortedChunks(5, 1, 1))
    value = torch.randn(*whole.segments[0].value.shape[:3], 24).to(HALF)
    segments = tuple(replace(segment, value=value) for segment in whole.segments)
    assert_agrees(kernel, replace(whole, segments=segments, empty=None))


@pytest.mark.parametrize("kernel", ["flash_attn", "xformers_flash"])
def test_another_order_of_equal_sorted_chunks_is_not_the_order_before(kernel):
    """Patterns with different tensors compare as equal. A cached plan must not be used for another pattern."""
    first = rounds(SortedChunks(5, 1, 1))
    assert_agrees(kernel, first)
    order = first.segments[0].pattern.order.flip(1)
    token = first.segments[0].pattern.token.flip(1)
    segments = tuple(
        replace(segment, pattern=replace(segment.pattern, order=order, token=token)) for segment in first.segments
    )
    assert_agrees(kernel, replace(first, segments=segments))


# Grouped key heads and wrap-around

KEY_MASK = torch.stack([PLACES > 3, (PLACES % 4 != 2) & (PLACES < 17)])
QUERY_MASK = torch.stack([PLACES < 15, PLACES % 3 != 0])


def attention(pattern, key_heads=(1,), q_len=20, key_mask=None, query_mask=None):
    """Return an attention with four query heads, and one segment for each number of key heads."""
    segments = tuple(
        Segment(*(heads(20, count, seed=2 * place + extra) for extra in (1, 2)), pattern, key_mask)
        for place, count in enumerate(key_heads)
    )
    return Attention(heads(q_len, 4), segments, 0.3, query_mask=query_mask)


PATTERNS = (
    *(Full(), Causal(), Causal(-3), Window(4, 0), Window(3, 2), Window(3, 2, 5)),
    *(Chunks(6, 1, 1), Chunks(6, -1, 1), Chunks(5, 2, 2), Chunks(7, 1, 0, causal=True), Chunks(6, -2, 2, causal=True)),
)


RUNS = [(kernel, pattern) for kernel in KERNELS for pattern in PATTERNS
        if kernel != "xformers_cutlass" or not isinstance(pattern, Window)]  # fmt: skip


@pytest.mark.parametrize(("kernel", "pattern"), RUNS, ids=str)
@pytest.mark.parametrize("masks", [{}, dict(key_mask=KEY_MASK, query_mask=QUERY_MASK)], ids=["", "masks"])
def test_grouped_key_heads_agree_for_every_pattern(kernel, pattern, masks):
    for key_heads in ((1,), (2, 1)):
        assert_agrees(kernel, attention(pattern, key_heads, **masks))


@every_kernel
@pytest.mark.parametrize("most", [1, 3])
def test_a_union_of_split_calls_agrees(monkeypatch, kernel, most):
    """A query is in several calls of one segment, and each call keeps its own state for the backward."""
    monkeypatch.setattr(calls, "MAX_SEQUENCES", most)
    monkeypatch.setattr(calls, "_plans", calls.TensorCache())
    assert_agrees(kernel, attention(Chunks(6, 1, 1), (2, 4), key_mask=KEY_MASK))
    assert_agrees(kernel, attention(Causal(), (2,), q_len=11, key_mask=KEY_MASK, query_mask=QUERY_MASK[:, :11]))
    assert_agrees(kernel, rounds(SortedChunks(5, 1, 1)))


def test_kernels_with_and_without_windows_have_separate_plans():
    """Plans are cached by masks. But the kernel without windows needs more calls for padded keys."""
    whole = attention(Causal(), key_mask=KEY_MASK)
    for kernel in ("flash_attn", "xformers_cutlass", "flash_attn", "xformers_cutlass"):
        assert_agrees(kernel, whole)


@pytest.mark.parametrize("kernel", ["flash_attn", "xformers_flash"])
def test_a_plan_serves_no_other_masks(kernel):
    """For example, key mask and query mask are exchanged, or only the batch size differs."""
    for masks in (dict(key_mask=KEY_MASK), dict(query_mask=KEY_MASK), {}, dict(key_mask=KEY_MASK, query_mask=KEY_MASK)):
        assert_agrees(kernel, attention(Causal(), **masks))
    whole = attention(Causal())
    one = whole.with_tensors(tuple(tensor[:1] for tensor in whole.tensors()))
    assert_agrees(kernel, one)
    changed = KEY_MASK.clone()
    assert_agrees(kernel, attention(Window(4, 0), key_mask=changed))
    changed[0, 10:] = False
    assert_agrees(kernel, attention(Window(4, 0), key_mask=changed))
