"""Predictions for a GPU count launches, FLOPs and bytes without a GPU. They never read a value or claim to measure."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from torch.utils._pytree import tree_map_only

from attnzoo.backends.triton.attend import attend
from attnzoo.benchmarks.cases import ModuleCall
from attnzoo.benchmarks.gpu.prediction import __main__ as command
from attnzoo.benchmarks.gpu.prediction import card, page, stored
from attnzoo.benchmarks.gpu.prediction.count import Answers, run
from attnzoo.benchmarks.gpu.prediction.goals import GOALS, NATIVE, Goal
from attnzoo.benchmarks.gpu.prediction.kernels import Visits, visits_of, work_of
from attnzoo.benchmarks.gpu.prediction.meta import readable_by_nobody
from attnzoo.benchmarks.gpu.prediction.stored import Count
from attnzoo.benchmarks.gpu.prediction.work import Recorder, Work
from attnzoo.errors import InvalidArgumentError
from attnzoo.registry import registry
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Segment
from tests.support.device_without_data import modules_of, run_module

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
TILE = 64  # queries and keys of a tile at head_dim 64 in bfloat16, compute capability 9.0
BATCH, HEADS, DIM = 2, 3, 64


def meta(*shape, dtype=torch.bfloat16, **options):
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def recorded(function):
    works: list[Work] = []
    with Recorder(works):
        function()
    return works


def launches_of(length, pattern, segments=1):
    """Return the works of the kernels of an attention, by name."""
    query = meta(BATCH, HEADS, length, DIM, requires_grad=True)
    key = meta(BATCH, HEADS, length * segments, DIM, requires_grad=True)
    value = meta(BATCH, HEADS, length * segments, DIM, requires_grad=True)
    patterns = pattern if isinstance(pattern, list) else [pattern]
    works = []
    with readable_by_nobody(lambda *launch: works.append(work_of(*launch))):
        output = attend(Attention(query, tuple(Segment(key, value, each) for each in patterns), 1.0))
        output.backward(torch.empty_like(output))
    return works


def test_flops_and_bytes_of_a_matrix_product():
    left, right = meta(3, 4), meta(4, 5)
    assert recorded(lambda: left @ right) == [Work("mm", 2 * 3 * 4 * 5, 2 * (3 * 4 + 4 * 5 + 3 * 5))]


def test_flops_of_causal_attention_are_half():
    def flops(is_causal):
        heads = meta(1, 2, 32, 16)
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        (work,) = recorded(lambda: attend(heads, heads, heads, 0.0, is_causal))
        return work.flops

    assert flops(False) == 2 * 32 * 32 * (2 * 16 + 2 * 16) and flops(True) == flops(False) // 2


def test_bytes_of_operators():
    rows, index = meta(100, 8), meta(4, dtype=torch.int64)
    assert recorded(lambda: rows + meta(8)) == [Work("add", 0, 2 * (800 + 8 + 800))]
    assert recorded(lambda: rows * meta(1, 1).expand(100, 8)) == [Work("mul", 0, 2 * (800 + 1 + 800))]
    repeated = meta(100, 8)[:1].expand(100, 8)
    assert recorded(lambda: repeated.clone()) == [Work("clone", 0, 2 * (8 + 800))]
    assert recorded(lambda: rows.copy_(meta(100, 8))) == [Work("copy_", 0, 2 * (800 + 800))], "not read before"
    assert recorded(lambda: rows.add_(1)) == [Work("add_", 0, 2 * (800 + 800))]
    assert recorded(lambda: rows.index_select(0, index)) == [Work("index_select", 0, 2 * (32 + 32) + 4 * 8)]
    windows = rows.as_strided((99, 16), (8, 1))  # each row but the ends occurs twice
    assert recorded(lambda: windows.clone()) == [Work("clone", 0, 2 * (800 + 99 * 16))]


def test_views_new_memory_and_the_host_launch_nothing():
    rows = meta(4, 8)
    assert recorded(lambda: rows.view(8, 4).T.unsqueeze(0).expand(3, 4, 8)[1:].split(1)) == []
    assert recorded(lambda: (torch.empty_like(rows), rows.new_empty(3), meta(3), rows.detach())) == []
    assert recorded(lambda: torch.ones(3) + 1) == []
    assert [work.name for work in recorded(lambda: rows.reshape(8, 4).T.reshape(32))] == ["clone"]


@pytest.mark.parametrize(
    ("left", "right", "tiles"),
    [
        (TILE, TILE, 3 * 8 - 2),
        (TILE + 1, TILE, 4 * 8 - 4),
        (TILE, TILE + 1, 4 * 8 - 4),
        (1, 0, 2 * 8 - 1),
        (8 * TILE, 8 * TILE, 64),
    ],
)
def test_flops_of_a_window_are_those_of_the_visited_tiles(left, right, tiles):
    works = launches_of(8 * TILE, Window(left, right))
    scores = BATCH * HEADS * tiles * TILE * TILE
    products = {work.name: work.flops / (2 * DIM * scores) for work in works}
    assert products == {"forward_kernel": 2, "query_kernel": 3, "key_kernel": 4}


@pytest.mark.parametrize(
    "pattern",
    [Window(100, 30), Causal(), Full(), Chunks(128, 1, 0, True), Chunks(128, 1, 1, False), Chunks(96, 0, 0, False)],
)
def test_visited_tiles_contain_every_visible_key(pattern):
    length = 5 * TILE + 10
    q, kv = torch.arange(length)[:, None], torch.arange(length)
    seen = pattern.mask_mod(length, length)(torch.tensor(0), torch.tensor(0), q, kv).expand(length, length)
    needed = torch.nn.functional.max_pool2d(seen[None].float(), TILE, ceil_mode=True).sum()
    forward = launches_of(length, pattern)[0]
    tiles = forward.flops / (4 * DIM * BATCH * HEADS * TILE * TILE)
    slack = 0 if not isinstance(pattern, Chunks) else 2  # the first chunk of a sequence may see the last
    assert needed <= tiles <= needed + slack


def test_a_tile_in_two_spans_of_keys_counts_once():
    spans = [(np.array([100, 0]), np.array([192, 64])), (np.array([0, 0]), np.array([70, 0]))]
    assert visits_of(spans, 192, TILE) == Visits(tiles=3 + 1, keys=1.0, queries=1.0)
    assert visits_of(spans, 192, 32) == Visits(tiles=3 + 3 + 2, keys=1.0, queries=1.0)


def test_bytes_of_a_window():
    forward, query, key = launches_of(8 * TILE, Window(TILE, TILE))
    rows = 2 * BATCH * HEADS * 8 * TILE * DIM  # bytes of the query, and of the keys, the values and their gradients
    of_row = 4 * BATCH * HEADS * 8 * TILE  # bytes of one float32 per query
    assert forward.bytes == 4 * rows + 2 * of_row, "query, key, value, out; two sums"
    assert query.bytes == 6 * rows + 3 * of_row, "also the gradients of out and query; delta"
    assert key.bytes == 6 * rows + 3 * of_row, "query, key, value and three gradients"


def test_bytes_of_a_sorted_round_are_those_of_its_keys():
    """A round reads its chunks and the chunk before. In the backward, it adds to their gradients."""
    length, order = 8 * TILE, meta(BATCH, HEADS, 8 * TILE, dtype=torch.int64)
    token = meta(BATCH, HEADS, 16 * TILE, dtype=torch.int64)
    rounds = [SortedChunks(2 * TILE, 1, 0, False, start, order, token) for start in (0, length)]
    works = launches_of(length, rounds, segments=2)
    first, second = (work.bytes for work in works if work.name == "forward_kernel")
    tile = 2 * BATCH * HEADS * TILE * DIM  # bytes of a tile of rows, bfloat16
    others = 8 * BATCH * HEADS * TILE * (8 + 16) + 2 * 4 * BATCH * HEADS * length  # order and token; two sums
    assert first == (8 + 2 * (8 + 2) + 2 * 8) * tile + others, "query; keys and values; float32 output"
    assert second == first + 8 * tile, "bfloat16 output, but also the float32 output of the first round"
    of_keys = {work.bytes for work in works if work.name == "key_kernel"}
    gradients = 2 * 2 * 2 * (8 + 2)  # key and value in float32, read and written
    assert of_keys == {(2 * 8 + 2 * (8 + 2) + gradients) * tile + others + 4 * BATCH * HEADS * length}


def test_launches_are_those_of_the_test_of_waits():
    """A prediction counts the launches that ``tests/patching/test_waits_and_launches.py`` limits."""
    for cls, (module, args, kwargs) in modules_of("led", "none").items():
        ran = run_module(module, args, kwargs, "triton")
        args, kwargs = tree_map_only(torch.Tensor, _with_gradients, (args, kwargs))
        recorded = run(ModuleCall(module, "*", module, args, kwargs, []), "triton", True, Answers)
        assert [work.name for work in recorded.forward] == ran.forward, cls
        assert [work.name for work in recorded.backward] == ran.backward, cls


def _with_gradients(tensor):
    return tensor.requires_grad_(tensor.is_floating_point() and tensor.ndim == 3)


def test_no_value_is_read():
    class Selects(torch.nn.Module):
        def forward(self, states):
            return states[states > 0]

    module = Selects()
    call = ModuleCall(module, "*", module, (torch.ones(2, 3),), {}, [])
    with pytest.raises(NotImplementedError, match="__getitem__"):
        run(call, NATIVE, False, Answers)


def test_the_process_is_unchanged_afterwards():
    states, backend = meta(1, 2, 8, 64), registry.backend_class("triton")()
    request = Attention(states, (Segment(states, states),), 1.0).request()
    before = type(backend).capabilities, torch.cuda.get_device_capability
    assert registry.refusals(backend, request)
    with readable_by_nobody(lambda *_: None):
        assert not registry.refusals(backend, request)
    assert registry.refusals(backend, request)
    assert (type(backend).capabilities, torch.cuda.get_device_capability) == before


def test_seconds_are_the_slowest_of_flops_bytes_and_launches():
    half = card.Card("half", 1e12, 1e9)
    product, copy, nothing = Work("mm", 10**12, 0), Work("copy_", 0, 10**9), Work("add", 0, 0)
    assert card.device_seconds(product, half) == pytest.approx(1 / card.PRODUCTS)
    assert card.device_seconds(product._replace(is_triton=True), half) == pytest.approx(1 / card.TRITON)
    assert card.device_seconds(copy, half) == pytest.approx(1 / card.BANDWIDTH)
    assert card.device_seconds(nothing, half) == card.SHORTEST
    works = ((copy, 2), (nothing, 1))
    device = Count("led", 64, NATIVE, False, works)
    assert card.seconds(device, half) == pytest.approx(2 / card.BANDWIDTH + card.SHORTEST)
    host = device._replace(works=((nothing, 3), (nothing._replace(is_triton=True), 2)))
    assert card.seconds(host, half) == pytest.approx(3 * card.HOST + 2 * card.HOST_TRITON)
    assert (device.launches, device.flops, device.bytes) == (3, 0, 2 * 10**9)
    assert card.by_operator(device, half)[0][0] == "copy_"


def test_command_counts_what_the_repository_stores(tmp_path, monkeypatch, capsys):
    """If this fails, run ``make docs-prediction``."""
    kept, versions = stored.read(RESULTS / stored.FILE)
    if any(metadata.version(name) != version for name, version in versions.items()):
        pytest.skip(f"other packages than those of {stored.FILE}: {versions}")
    goals = tuple(goal for goal in GOALS if goal.family == "reformer_local")
    for module in (command, page):
        monkeypatch.setattr(module, "GOALS", goals)
    command.main(["--json", str(tmp_path / "counts.json")])
    fresh, _ = stored.read(tmp_path / "counts.json")
    assert len(fresh) == 4 and fresh == [count for count in kept if count.family == "reformer_local"]
    printed = capsys.readouterr().out
    assert printed.startswith(page.TITLE) and printed.count("| reformer_local |") == 4
    assert json.loads((tmp_path / "counts.json").read_text())["versions"] == versions


def test_command_needs_triton(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(InvalidArgumentError, match="triton: got no installed package"):
        command.main([])


def lines_with(monkeypatch, forward, measured):
    """Return the page of one module whose original takes 4 ms and whose patched module takes 1 ms on an H200."""
    goal = Goal("led", "triton", forward, None, (measured, measured))
    monkeypatch.setattr(page, "GOALS", (goal,))
    byte_count = int(1e-3 * card.BANDWIDTH * card.H200.bandwidth)
    counts = [
        Count("led", 64, backend, train, ((Work("add", 0, byte_count), calls),))
        for train in (False, True)
        for backend, calls in ((NATIVE, 4), ("triton", 1))
    ]
    return list(page.lines(counts, {"torch": "2"}))


def test_every_title_says_that_nothing_was_measured(monkeypatch):
    titles = [line for line in lines_with(monkeypatch, 4.0, 4.0) if line.startswith("#")]
    assert titles and all("not measured" in title for title in titles)


def test_page_names_missed_goals_and_wrong_predictions(monkeypatch):
    good, bad = ("\n".join(lines_with(monkeypatch, *numbers)) for numbers in ((3.9, 7.9), (4.1, 8.1)))
    assert "below the goal in 0 of 2" in good and "off by more than 2x" not in good
    assert "below the goal in 2 of 2" in bad and bad.count("off by more than 2x") == 2
    assert "- led, forward, H200: 4.00x, goal 4.1x. Slowest on the device: `add` 1.00 ms." in bad
