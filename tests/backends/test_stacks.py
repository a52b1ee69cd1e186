"""Blocks with equal masks share a call of the CPU kernel: fewer calls, the same attention."""

from dataclasses import dataclass

import pytest
import torch

import attnzoo
from attnzoo import Attention, Causal, Chunks, Full, RelativeBias, Segment, Window
from attnzoo.backends.sdpa import flash_cpu
from attnzoo.backends.sdpa import stacks as sdpa_stacks
from attnzoo.backends.sdpa.stacks import Scratch, stacks
from attnzoo.registry import registry
from attnzoo.spec.patterns import Pattern


def tensors(batch=2, q_len=300, kv_len=300, heads=4, kv_heads=2, dtype=torch.float64):
    shapes = [(batch, heads, q_len, 8), (batch, kv_heads, kv_len, 8), (batch, kv_heads, kv_len, 8)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def windowed(**more):
    query, key, value = tensors()
    return Attention(query, (Segment(key, value, Window(40, 40), **more),), 0.3)


def counts(attention):
    return [stack.depth for stack in stacks(attention, list(range(len(attention.segments))))]


def test_the_inside_of_a_window_is_one_stack():
    depths = counts(windowed())
    assert max(depths) >= 5 and sum(depths) == 10


@pytest.mark.parametrize("apart", [False, True], ids=["rows side by side", "rows apart"])
@pytest.mark.parametrize("often", [False, True], ids=["read by few blocks", "read by many blocks"])
def test_a_stack_covers_its_blocks(monkeypatch, apart, often):
    monkeypatch.setattr(sdpa_stacks, "_READS", 3 if often else 4)  # 112 keys with step 32
    attention = windowed()
    stack = max(stacks(attention, [0]), key=lambda stack: stack.depth)
    query, key = attention.query[:1], attention.segments[0].key[:1]
    if apart:  # as in a projection
        query, key = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key))
    queries, keys = stack.take(query), stack.keys(0, key, 2, Scratch())
    assert queries.untyped_storage().data_ptr() == query.untyped_storage().data_ptr(), "a view"
    assert (keys.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()) == (not (apart and often)), (
        "a copy only where it pays"
    )
    assert keys.stride(-2) == (keys.shape[-1] if often or not apart else 2 * keys.shape[-1])
    for number in range(stack.depth):
        q, k = (block.q_start + number * stack.steps[0] for block in (stack.block, stack.block))
        k += stack.block.parts[0].kv_start - stack.block.q_start
        assert torch.equal(queries[:, number], query[0, :, q : q + 32])
        assert torch.equal(keys[:, number], key[0, :, k : k + 112])
    written = torch.zeros_like(query)
    stack.put(written, queries)
    first, last = stack.whole()[:2]
    assert torch.equal(written[:, :, first:last], query[:, :, first:last])
    assert not written[:, :, :first].any() and not written[:, :, last:].any()


def test_parts_that_need_a_mask_have_multiples_of_16_keys():
    query, key, value = tensors()
    attention = Attention(query, (Segment(key, value, Window(37, 40)), Segment(key[:, :, :7], value[:, :, :7])), 0.3)
    lengths = [[p.kv_stop - p.kv_start for p in stack.parts] for stack in stacks(attention, [0, 1]) if stack.depth > 1]
    assert lengths == [[112, 7]], "32 + 37 + 40 keys, rounded up; the keys that all queries see have no mask"


def test_long_runs_are_planned_without_a_look_at_every_block(monkeypatch):
    query, key, value = (torch.empty(()).expand(1, 1, 1 << 16, 8) for _ in range(3))
    attention = Attention(query, (Segment(key, value, Window(40, 40)),), 0.3)
    seen, block_at = [], sdpa_stacks.block_at
    monkeypatch.setattr(sdpa_stacks, "block_at", lambda *args: seen.append(args) or block_at(*args))
    assert sum(stack.depth for stack in stacks(attention, [0])) == 2048
    assert len(seen) < 2048 / 8


def test_scratch_memory_is_allocated_once():
    scratch = Scratch()
    given = [torch.randn(2, n, 3, 4).transpose(1, 2) for n in (9, 5, 9)]
    places = set()
    for tensor in given:
        close = scratch.contiguous_rows(tensor)
        assert torch.equal(close, tensor) and close.is_contiguous()
        places.add(close.data_ptr())
    assert len(places) == 1


def test_stacks_depend_on_pattern_bias_and_masks():
    query, key, value = tensors()
    seen = torch.ones(2, 300, dtype=torch.bool)
    seen[1, 150] = False
    relative = RelativeBias(torch.randn(4, 81, dtype=torch.float64), zero=40)
    assert max(counts(windowed(bias=relative))) >= 5
    assert max(counts(windowed(key_mask=seen | True))) >= 5
    assert 1 < max(counts(windowed(key_mask=seen))) < 5, "blocks that see the hidden key are not stacked"
    assert max(counts(windowed(mask=torch.rand(2, 1, 300, 300) < 0.5))) == 1
    assert max(counts(windowed(bias=attnzoo.DenseBias(torch.randn(1, 1, 300, 300, dtype=torch.float64))))) == 1
    assert max(counts(Attention(query, (Segment(key, value, Causal()),), 0.3))) == 1
    assert counts(Attention(query, (Segment(key, value, Full()),), 0.3)) == [1], "there is only one block"


@dataclass(frozen=True)
class Accelerating(Pattern):
    """Each block of 32 queries sees 16 keys, and moves further than the block before."""

    def mask_mod(self, q_len, kv_len):
        def seen(b, h, q, kv):
            start = (q // 32) * (q // 32 + 1) // 2
            return (start <= kv) & (kv < start + 16)

        return seen

    def kv_spans(self, q_start, q_stop, q_len, kv_len):
        start = (q_start // 32) * (q_start // 32 + 1) // 2
        return ((start, start + 16),)

    def sees_all(self, tile):
        return False

    def block_size(self, q_len, kv_len):
        return 32

    def block_key(self, tile):
        return tile.q_stop - tile.q_start, tile.kv_stop - tile.kv_start


@dataclass(frozen=True)
class InHalves(Pattern):
    """A query sees 10 keys, in two separate ranges. A longer range would contain keys of the other one."""

    def mask_mod(self, q_len, kv_len):
        return lambda b, h, q, kv: (kv <= q) & (q < kv + 10)

    def kv_spans(self, q_start, q_stop, q_len, kv_len):
        start = max(0, q_start - 9)
        middle = (start + q_stop) // 2
        return ((start, middle), (middle, q_stop))

    def block_size(self, q_len, kv_len):
        return 32

    def block_key(self, tile):
        return tile.shape_and_distance


CASES = {
    "two parts of a segment": lambda key, value, seen: [Segment(key, value, InHalves())],
    "window": lambda key, value, seen: [Segment(key, value, Window(40, 40))],
    "causal window": lambda key, value, seen: [Segment(key, value, Window(64, 0))],
    "padded window": lambda key, value, seen: [Segment(key, value, Window(40, 40), key_mask=seen)],
    "window and common keys": lambda key, value, seen: [
        Segment(key, value, Window(40, 40)),
        Segment(key[:, :, :3], value[:, :, :3]),
    ],
    "window and padded common keys": lambda key, value, seen: [
        Segment(key, value, Window(40, 40)),
        Segment(key[:, :, 140:170], value[:, :, 140:170], key_mask=seen[:, 140:170]),
    ],
    "window with bias": lambda key, value, seen: [
        Segment(key, value, Window(40, 40), bias=RelativeBias(torch.randn(4, 81, dtype=key.dtype), zero=40))
    ],
    "chunks": lambda key, value, seen: [Segment(key, value, Chunks(20, 1, 1))],
    "uneven steps": lambda key, value, seen: [Segment(key, value, Accelerating())],
    "two windows": lambda key, value, seen: [
        Segment(key, value, Window(40, 0)),
        Segment(key.flip(2), value.flip(2), Window(0, 40)),
    ],
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("apart", [False, True], ids=["rows side by side", "rows apart"])
def test_stacked_blocks_agree_with_eager(make, batch, apart):
    query, key, value = tensors(batch)
    if apart:
        query, key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value))
    seen = torch.ones(batch, 300, dtype=torch.bool)
    seen[-1, 150:160] = False
    attention = Attention(query, tuple(make(key, value, seen)), 0.3)
    expected = registry.make_backend("eager").run(attention).output
    torch.testing.assert_close(flash_cpu.attend(attention), expected)


@pytest.mark.parametrize("apart", [False, True], ids=["rows side by side", "rows apart"])
def test_the_second_stack_agrees_with_eager(apart):
    """One call has at most 1024 rows, so a long window needs several stacks."""
    query, key, value = tensors(1, 2500, 2500, 2, 1)
    if apart:
        query, key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value))
    bias = RelativeBias(torch.randn(2, 30, dtype=torch.float64), zero=9)
    segments = Segment(key, value, Window(40, 30), bias=bias), Segment(value[:, :, :3], key[:, :, :3])
    attention = Attention(query, segments, 0.3)
    assert sorted(counts(attention))[-2:] == [32, 32]
    torch.testing.assert_close(flash_cpu.attend(attention), registry.make_backend("eager").run(attention).output)


def test_stacks_need_fewer_calls(monkeypatch):
    calls = []

    class Counting:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(torch.ops.aten, name)

    attention = windowed()
    assert flash_cpu.unavailable() is None
    monkeypatch.setattr(flash_cpu, "_operators", Counting())
    flash_cpu.attend(attention)
    assert len(calls) <= 6, "two samples, and a block or two at either end, instead of ten blocks"
