"""Peers that are kernels of PyTorch: which rows they have, and that the hand-written FlexAttention is the pattern."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from attnzoo.benchmarks.cases import Case
from attnzoo.benchmarks.kernel_peers import BLOCK, KERNEL_PEERS, block_mask, hand_written, random_inputs, sides
from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.runner import ShootoutPlan
from attnzoo.benchmarks.workload import Shape
from attnzoo.spec.patterns import Causal, Window

LENGTH = 2 * BLOCK + 37
SHAPES = [
    Shape(2, 8, Window(100, 20)),
    Shape(2, 8, Window(150, 150), global_keys=3),
    Shape(2, 8, Window(30, 30), has_bias=True),
    Shape(1, 8, Causal()),
]
IDS = ["window", "global keys", "bias", "causal, one key head"]


def case(family="led", device="cuda", scope="attention"):
    return Case(family, scope, LENGTH, 1, "float32", device, 1, False)


def visible(shape):
    """The definition of which query sees which key."""
    q, kv = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    left, right = sides(shape, LENGTH)
    return ((q - kv <= left) & (kv - q <= right)) | (kv < shape.global_keys)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_hand_written_flex_is_attention_with_the_pattern(shape):
    inputs = random_inputs(case(device="cpu"), 2, shape)
    query, key, value, *table = inputs
    output = hand_written(inputs, shape, flex_attention)()
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~visible(shape), float("-inf"))
    if table:
        left, right = sides(shape, LENGTH)
        distance = torch.arange(LENGTH)[None, :] - torch.arange(LENGTH)[:, None]
        mask = mask + table[0][:, (distance + left).clamp(0, left + right)]
    key, value = (part.expand_as(query) for part in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    assert torch.allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_block_mask_covers_the_pattern_and_hides_nothing_in_whole_blocks(shape):
    """Uncompiled FlexAttention ignores the block lists, so they need a test."""
    left, right = sides(shape, LENGTH)
    lists = block_mask(LENGTH, left, right, shape.global_keys, lambda b, h, q, kv: q >= kv, torch.device("cpu"))
    dense = torch.zeros(3 * BLOCK, 3 * BLOCK, dtype=torch.bool)
    dense[:LENGTH, :LENGTH] = visible(shape)
    tiles = dense.view(3, BLOCK, 3, BLOCK).transpose(1, 2)
    partial, full = ({(row, column) for row in range(3) for column in columns[0, 0, row, : counts[0, 0, row]].tolist()}
                     for counts, columns in ((lists.kv_num_blocks, lists.kv_indices),
                                             (lists.full_kv_num_blocks, lists.full_kv_indices)))  # fmt: skip
    needed = {(row, column) for row in range(3) for column in range(3) if tiles[row, column].any()}
    assert needed <= partial | full and not partial & full
    assert all(tiles[row, column][: LENGTH - row * BLOCK].all() for row, column in full)


def test_peers_have_rows_on_a_card_where_they_know_the_pattern():
    rows = {family: [peer.name for peer in KERNEL_PEERS if peer.has_row(case(family))] for family in WORKLOADS}
    local, causal = ["FA2 window", "FlexAttention"], ["cuDNN", "FlexAttention"]
    assert rows["led"] == rows["longt5_local"] == rows["reformer_local"] == local
    assert rows["gpt_neox"] == rows["gpt_bigcode"] == causal and rows["reformer"] == rows["longt5_tglobal"] == []
    others = [case(device="cpu"), case(scope="module")]
    assert not any(peer.has_row(other) for peer in KERNEL_PEERS for other in others)


@pytest.mark.parametrize("family", [name for name, workload in WORKLOADS.items() if workload.shape])
def test_shape_is_that_of_the_published_model(family):
    workload = WORKLOADS[family]
    model = workload.build(layers=1)
    module = next(module for module in model.modules() if type(module).__name__ == workload.attention)
    names = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
    assert workload.shape.head_dim in [getattr(module, name, None) for name in names]


def test_plan_has_kernel_peers_on_a_card_only(monkeypatch):
    fields = dict(families=("led",), scope="attention", backends=("sdpa",))
    assert [contender.name for contender in ShootoutPlan(**fields).contenders()] == ["native", "sdpa"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = [contender.name for contender in ShootoutPlan(device="cuda", **fields).contenders()]
    assert names == ["native", "sdpa", "FA2 window", "cuDNN", "FlexAttention"]
