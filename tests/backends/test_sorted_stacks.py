"""Chunks of sorted keys share a call of the CPU kernel, each with its own mask."""

import pytest
import torch

from attnzoo import Attention, Segment
from attnzoo.backends.common import blocks
from attnzoo.backends.common.additive_masks import TokenMasks
from attnzoo.backends.sdpa import flash_cpu, sorted_stacks
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.registry import registry
from attnzoo.spec.patterns import SortedChunks

HEADS, LENGTH, DIM, ROUNDS = 3, 48, 8, 2
at_once = pytest.mark.parametrize("at_once", [1, 1 << 6, 1 << 12], ids=["a chunk", "some chunks", "all chunks"])


def attention(batch, length=4, before=1, after=0, causal=True, hidden=0, kv_heads=HEADS, key_mask=None, apart=False):
    order = torch.rand(ROUNDS, batch, HEADS, LENGTH).argsort(-1)
    token = torch.cat(list(order), dim=-1)
    token = token.masked_fill(token < hidden, -1)
    shape = (batch, ROUNDS * LENGTH, kv_heads, DIM)
    key, value = (torch.randn(shape).transpose(1, 2) for _ in range(2))
    key, value = (key, value) if apart else (key.contiguous(), value.contiguous())
    segments = [
        Segment(key, value, SortedChunks(length, before, after, causal, n * LENGTH, order[n], token), key_mask)
        for n in range(ROUNDS)
    ]
    return Attention(torch.randn(batch, LENGTH, HEADS, DIM).transpose(1, 2), tuple(segments), 0.4)


def stacks_of(whole):
    return list(sorted_stacks.sorted_stacks(whole, 1))


@at_once
@pytest.mark.parametrize("length", [4, 7, 16])
def test_every_query_is_in_exactly_one_stack(monkeypatch, at_once, length):
    monkeypatch.setattr(sorted_stacks, "_ROWS", at_once)
    counts = torch.zeros(2, HEADS, LENGTH)
    for stack in stacks_of(attention(2, length)):
        stack.put(counts, stack.take(counts) + 1)
    assert torch.equal(counts, torch.ones_like(counts))


def test_a_stack_has_at_most_the_rows_of_one_call(monkeypatch):
    monkeypatch.setattr(sorted_stacks, "_ROWS", 64)
    assert [stack.depth for stack in stacks_of(attention(1, 4))] == [5, 5, 2], "4 * 5 * 3 heads are 60 rows"
    monkeypatch.setattr(sorted_stacks, "_ROWS", 1)
    assert {stack.depth for stack in stacks_of(attention(1, 4))} == {1}, "a block is never cut"


def test_key_masks_are_not_stacked():
    key_mask = torch.rand(2, ROUNDS * LENGTH) < 0.7
    assert {stack.depth for stack in stacks_of(attention(2, key_mask=key_mask))} == {1}


CASES = {
    "causal": {},
    "all tokens but its own": dict(causal=False),
    "padding": dict(hidden=9),
    "padding, not causal": dict(hidden=9, causal=False),
    "chunks on both sides": dict(before=1, after=1, causal=False),
    "chunks that fit no round": dict(length=7, before=2),
    "rows apart": dict(apart=True),
    "a shared key head": dict(kv_heads=1),
    "key mask": dict(key_mask=True),
}


@at_once
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("batch", [1, 2])
def test_stacked_chunks_agree_with_the_oracle(monkeypatch, at_once, case, batch):
    monkeypatch.setattr(sorted_stacks, "_ROWS", at_once)
    key_mask = torch.rand(batch, ROUNDS * LENGTH) < 0.7 if "key_mask" in case else None
    whole = attention(batch, **{**case, "key_mask": key_mask})
    report = check_attention("sorted", whole, registry.make_backend("sdpa"), grad=batch == 2, max_rows=ALL_ROWS)
    assert report.ok and report.kernel == flash_cpu.KERNEL, "\n".join(map(str, report.checks))


def test_blocks_with_the_same_keys_are_not_stacked(monkeypatch):
    """A chunk of more than ``DENSE_ROWS`` queries has several blocks, which see the same keys and so form no stack."""
    monkeypatch.setattr(blocks, "DENSE_ROWS", 4)
    whole = attention(1, length=8)
    assert max(stack.depth for stack in stacks_of(whole)) == 2, "the end of a chunk and the begin of the next"
    report = check_attention("long", whole, registry.make_backend("sdpa"), grad=True, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, report.checks))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("hidden", [0, 3])
def test_masks_of_a_stack_are_those_of_its_blocks(causal, hidden):
    token = torch.rand(2, HEADS, 20).argsort(-1)
    masks = TokenMasks(token.masked_fill(token < hidden, -1), causal, torch.float32)
    queries = torch.rand(2, HEADS, 20).argsort(-1)[:, :, :12].unflatten(2, (3, 4))
    stacked, rows = masks.of(queries, 2, 8, step=5)
    stacked = stacked.clone()
    for number in range(3):
        mask, some_rows = masks.of(queries[:, :, number], 2 + 5 * number, 8 + 5 * number)
        assert torch.equal(stacked[:, :, number], mask)
        if rows is not None:
            some_rows = torch.ones(2, HEADS, 4, dtype=torch.bool) if some_rows is None else some_rows
            assert torch.equal(rows[:, :, number], some_rows)
        else:
            assert some_rows is None
