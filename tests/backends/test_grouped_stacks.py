"""Queries with equal positions share a call and a mask of the CPU kernel."""

from dataclasses import replace

import pytest
import torch

from attnzoo import Attention, RelativeBias, Segment, Window
from attnzoo.backends.common import blocks
from attnzoo.backends.sdpa import flash_cpu, grouped_stacks
from attnzoo.backends.sdpa.grouped_stacks import other_queries
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.registry import registry

HEADS, LENGTH, KEYS, DIM = 4, 61, 9, 8
REGULAR = torch.arange(LENGTH) // 7
POSITIONS = {
    "groups of 7 and a rest": REGULAR,
    "the last group is longer": REGULAR.clamp(max=7),
    "padding on the left": (torch.arange(LENGTH) // 5 - 3).clamp(min=-1),
    "padding on the right": REGULAR.masked_fill(torch.arange(LENGTH) > 40, -1),
    "positions in no order": (REGULAR * 5) % 9,
    "groups of 7, then groups of 3": torch.cat([torch.arange(28) // 7, torch.arange(33) // 3]),
    "one position": torch.zeros(LENGTH, dtype=torch.long),
    "no groups": torch.arange(LENGTH) % KEYS,
}
every_kind = pytest.mark.parametrize("kind", POSITIONS)


@pytest.fixture(autouse=True)
def several_calls_and_blocks(monkeypatch):
    monkeypatch.setattr(grouped_stacks, "_ROWS", 21)
    monkeypatch.setattr(grouped_stacks, "_FEWEST", 2)
    monkeypatch.setattr(grouped_stacks, "DENSE_ROWS", 4)
    monkeypatch.setattr(blocks, "_MOST_KEYS", 0)


def attention(kind, kv_heads=2, hidden_keys=(), grad=False):
    """Return an attention whose second sample has the positions of ``kind``. The first sample has the first kind."""
    positions = torch.stack([REGULAR, POSITIONS[kind]])

    def normal(length, heads):  # rows of a head lie apart, as in a projection
        return torch.randn(2, length, heads, DIM).transpose(1, 2).requires_grad_(grad)

    values = torch.randn(HEADS, 5, requires_grad=grad)
    key_mask = None
    if hidden_keys:
        key_mask = torch.ones(2, KEYS, dtype=torch.bool)
        key_mask[1, list(hidden_keys)] = False
    bias = RelativeBias(values, zero=2, positions=positions)
    segment = Segment(normal(KEYS, kv_heads), normal(KEYS, kv_heads), key_mask=key_mask, bias=bias)
    return Attention(normal(LENGTH, HEADS), (segment,), 0.4)


def assert_agrees(whole, grad=True):
    report = check_attention("grouped", whole, registry.make_backend("sdpa"), grad=grad, max_rows=ALL_ROWS)
    assert report.ok and report.kernel == flash_cpu.KERNEL, "\n".join(map(str, report.checks))


@every_kind
def test_every_query_is_in_exactly_one_stack(kind):
    whole = attention(kind)
    grouped = grouped_stacks.grouped_stacks(whole, 0)
    counts = torch.zeros(2, 1, LENGTH)
    for stack in (*grouped, *other_queries(whole, 0, grouped)):
        rows = stack.take(counts)
        stack.put(counts, rows + 1)
    assert torch.equal(counts, torch.ones_like(counts))


@every_kind
def test_the_queries_of_a_stack_have_equal_positions(kind):
    whole = attention(kind)
    positions = whole.segments[0].bias.positions[:, None].expand(-1, HEADS, -1)
    stacks = grouped_stacks.grouped_stacks(whole, 0)
    assert stacks and all(stack.size * stack.groups <= max(21, 2 * stack.size) for stack in stacks)
    for stack in stacks:
        rows = stack.take(positions)
        assert rows.shape == (HEADS, stack.size, stack.groups)
        assert torch.equal(rows, rows[:, :1].expand_as(rows))


@every_kind
@pytest.mark.parametrize("hidden_keys", [(), (8,), (0, 4), range(KEYS)], ids=["none", "last", "some", "all"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_grouped_queries_agree_with_the_oracle(kind, hidden_keys, kv_heads):
    assert_agrees(attention(kind, kv_heads, hidden_keys), grad=False)


@every_kind
@pytest.mark.parametrize("hidden_keys", [(), range(KEYS)], ids=["all keys", "no keys"])
def test_gradients_agree_with_the_oracle_beside_a_window(kind, hidden_keys):
    whole = attention(kind, hidden_keys=hidden_keys, grad=True)
    key, value = (torch.randn(2, 2, LENGTH, DIM, requires_grad=True) for _ in range(2))
    window = Segment(key, value, Window(6, 5), bias=RelativeBias(torch.randn(HEADS, 9, requires_grad=True), zero=4))
    assert_agrees(replace(whole, segments=(window, *whole.segments)))


def test_grouped_queries_need_one_mask_per_call(monkeypatch):
    made = []
    at_positions = RelativeBias.at_positions
    monkeypatch.setattr(RelativeBias, "at_positions", lambda *args: made.append(args) or at_positions(*args))
    flash_cpu.attend(attention("groups of 7 and a rest"))
    assert [len(positions) for _, positions, _ in made] == [3, 3, 2] * 2, "of each sample: 8 groups of 7 queries"


def test_few_large_groups_are_ordinary_blocks(monkeypatch):
    """If all tokens of a sample have one position, a stack would have one row per matrix product, which is slow."""
    monkeypatch.undo()
    whole = attention("one position")
    assert grouped_stacks.grouped_stacks(whole, 0) == []
    assert_agrees(whole)
