"""Short inputs are one block for all queries on the CPU, because several blocks would see most keys anyway."""

from dataclasses import replace

import pytest
import torch

from attnzoo import Attention, Causal, Chunks, Full, RelativeBias, Segment, Window
from attnzoo.backends.common.blocks import block_size, is_short
from attnzoo.backends.sdpa.stacks import stacks
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.registry import registry
from attnzoo.spec.patterns import SortedChunks

HEADS, DIM = 2, 8


def normal(*shape, grad=False):
    return torch.randn(shape, requires_grad=grad)


def with_window(length, grad=False, **more):
    """The 32 queries in the middle see 112 keys, so 168 keys are the most for one block."""
    query, key, value = (normal(2, HEADS, length, DIM, grad=grad) for _ in range(3))
    return Attention(query, (Segment(key, value, Window(40, 40), **more),), 0.4)


def with_globals(length, grad=False):
    whole = with_window(length, grad)
    return replace(whole, segments=(*whole.segments, Segment(*(normal(2, HEADS, 5, DIM, grad=grad) for _ in range(2)))))


def with_bias(length, grad=False):
    return with_window(length, grad, bias=RelativeBias(normal(HEADS, 60, grad=grad), zero=30))


def with_groups(length, grad=False):
    """The local segment and the aggregate keys of transient-global attention."""
    positions = (torch.arange(length) // 8).clamp(max=length // 8 - 1).expand(2, -1)
    key, value = (normal(2, HEADS, length // 8, DIM, grad=grad) for _ in range(2))
    bias = RelativeBias(normal(HEADS, 9, grad=grad), zero=4, positions=positions)
    whole = with_bias(length, grad)
    return replace(whole, segments=(*whole.segments, Segment(key, value, bias=bias)))


def with_chunks(length, grad=False):
    """The 32 queries in the middle see ``length / 2 + 32`` keys, because they see no later keys."""
    query, key, value = (normal(2, HEADS, length, DIM, grad=grad) for _ in range(3))
    return Attention(query, (Segment(key, value, Chunks(56, 1, 0, causal=True)),), 0.4)


KINDS = {
    "window": with_window, "window and globals": with_globals, "local bias": with_bias,
    "transient-global": with_groups, "chunks": with_chunks,
}  # fmt: skip
CROSSINGS = {"window": 168, "window and globals": 170, "local bias": 168, "transient-global": 172, "chunks": 192}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_one_block_below_the_crossing_and_several_above(kind):
    length = CROSSINGS[kind]
    below, above = KINDS[kind](length), KINDS[kind](length + 8)
    assert is_short(below) and block_size(below) == length
    assert [stack.depth for stack in stacks(below, list(range(len(below.segments))))] == [1]
    assert not is_short(above) and block_size(above) < length


@every_kind
@pytest.mark.parametrize("padding", ["none", "keys", "queries and keys"])
@pytest.mark.parametrize("length", [1, 16, 57, 160, 184])
def test_both_sides_of_the_crossing_agree_with_the_oracle(kind, padding, length):
    if (kind == "transient-global" and length < 8) or (kind == "chunks" and length == 1):
        pytest.skip("no aggregate key, or a chunk that is too short")
    whole = KINDS[kind](length, grad=True)
    if padding != "none":
        key_mask = torch.arange(length).expand(2, -1) < torch.tensor([[length], [length // 2]])
        local = replace(whole.segments[0], key_mask=key_mask)
        query_mask = key_mask if padding == "queries and keys" else None
        whole = replace(whole, segments=(local, *whole.segments[1:]), query_mask=query_mask)
    report = check_attention("short", whole, registry.make_backend("sdpa"), grad=True, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, report.checks))


def test_the_mask_of_one_block_is_small_for_any_window():
    """Even for a window as long as the input, the mask does not grow with the square of the length."""
    shell = torch.empty(()).expand(1, 12, 4096, 64)
    segment = Segment(shell, shell, Window(4000, 4000))
    assert not is_short(Attention(shell, (segment,), 1.0))
    short = shell[:, :, :1024]
    segment = Segment(short, short, Window(4000, 4000))
    assert is_short(Attention(short, (segment,), 1.0)), "one mask for all heads"
    biased = replace(segment, bias=RelativeBias(torch.zeros(12, 3), zero=1))
    assert not is_short(Attention(short, (biased,), 1.0)), "a mask for each head"


def test_only_patterns_in_sequence_order_on_the_cpu_are_one_block():
    query = normal(1, HEADS, 8, DIM)
    order = torch.arange(8).expand(1, HEADS, -1)
    pattern = SortedChunks(4, 1, 0, order=order, token=order)
    assert not is_short(Attention(query, (Segment(query, query, pattern),), 1.0))
    for pattern in (Full(), Causal(), Window(3, 3)):
        assert is_short(Attention(query, (Segment(query, query, pattern),), 1.0))
        meta = query.to("meta")
        assert not is_short(Attention(meta, (Segment(meta, meta, pattern),), 1.0))
