"""Block lists: every block that is left out is hidden, and every full block is fully visible."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode  # no public function shows what operations return
from torch.utils._pytree import tree_leaves

import attnzoo
from attnzoo import Attention, Segment, Window
from attnzoo.backends.common import block_lists as module
from attnzoo.backends.common.block_lists import BlockShape, block_lists, segment_starts

SHAPE = BlockShape(64, 64)
LENGTH = 300


WINDOW = Window(40, 30)


def attention(pattern=WINDOW, padded=True, length=LENGTH):
    """A segment with this pattern, padded at the start of one sample and the end of the other, and a short segment."""
    query, key, short = torch.randn(2, 2, length, 4), torch.randn(2, 2, length, 4), torch.randn(2, 2, 43, 4)
    unpadded = torch.ones((2, length), dtype=torch.bool)
    unpadded[0, : length // 3], unpadded[1, length - length // 4 :] = False, False
    segment = Segment(key, key, pattern, key_mask=unpadded if padded else None)
    return Attention(query, (segment, Segment(short, short)), 1.0)


def visible_grid(whole):
    """Which keys each query sees, by definition: ``(batch, q_len, keys of all segments)``."""
    rows = torch.arange(whole.q_len)
    grids = []
    for segment in whole.segments:
        visible = segment.visible(rows, torch.arange(segment.kv_len), whole.q_len)
        shape = (whole.batch, 1, whole.q_len, segment.kv_len)
        grids.append((torch.ones(()).bool() if visible is None else visible).expand(shape))
    return torch.cat(grids, -1)[:, 0]


@pytest.mark.parametrize(
    "pattern",
    [
        attnzoo.Full(), attnzoo.Causal(), attnzoo.Causal(0), attnzoo.Window(90, 3), attnzoo.Window(200, 200),
        attnzoo.Chunks(32, 1, 1), attnzoo.Chunks(64, 1, 0, causal=True), attnzoo.Chunks(200, 1, 0),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("padded", [True, False], ids=["padding", "no padding"])
@pytest.mark.parametrize("shape", [SHAPE, BlockShape(128, 32)], ids=str)
def test_block_lists_agree_with_the_mask(pattern, padded, shape):
    whole = attention(pattern, padded)
    lists, grid = block_lists(whole, shape), visible_grid(whole)
    keys, counts = segment_starts(whole)[-1], {"partial": 0, "full": 0, "absent": 0}
    for sample in range(2):
        for row in range(-(-LENGTH // shape.queries)):
            numbers = {}
            for kind in ("partial", "full"):
                count = int(getattr(lists, f"{kind}_count")[sample, 0, row])
                numbers[kind] = getattr(lists, kind)[sample, 0, row, :count].tolist()
            assert not set(numbers["partial"]) & set(numbers["full"])
            for column in range(-(-keys // shape.keys)):
                block = grid[sample, row * shape.queries :, column * shape.keys :][: shape.queries, : shape.keys]
                kind = next((kind for kind, listed in numbers.items() if column in listed), "absent")
                counts[kind] += 1
                assert kind == "partial" or bool((block == (kind == "full")).all()), (sample, row, column, kind)
    assert counts["full"] or isinstance(pattern, attnzoo.Window | attnzoo.Chunks), counts


def test_layers_share_block_lists_until_the_padding_changes(monkeypatch):
    calls = []
    make_lists = module._make_lists
    monkeypatch.setattr(module, "_make_lists", lambda *args: calls.append(1) or make_lists(*args))
    whole = attention(length=111)
    layers = [replace(whole, query=torch.randn_like(whole.query)) for _ in range(3)]
    assert len({id(block_lists(layer, SHAPE)) for layer in layers}) == len(calls) == 1
    block_lists(whole, BlockShape(32, 32))
    assert len(calls) == 2, "another block size needs other lists"
    whole.segments[0].key_mask[0, :] = True
    block_lists(whole, SHAPE)
    assert len(calls) == 3, "a mask that was written to is another mask"


def test_cached_lists_serve_no_other_attention():
    """Each attention differs from the previous attention in one property that the lists depend on."""
    query, key = torch.randn(2, 2, 130, 4), torch.randn(2, 2, 130, 4)
    hides = torch.ones((2, 130), dtype=torch.bool)
    hides[0, :70], hides[1, 100:] = False, False
    masked, plain = Segment(key, key, WINDOW, hides), Segment(key, key, WINDOW)
    for segments in (
        (plain, plain),
        (masked, plain),
        (plain, masked),
        (masked, masked),
        (masked, replace(masked, key_mask=hides.flip(0))),
        (masked, replace(plain, pattern=Window(30, 40))),
        (masked, Segment(key[:, :, :90], key[:, :, :90], WINDOW)),
        (Segment(key[:, :, :90], key[:, :, :90], WINDOW), plain),
        (plain,),
    ):
        for rows in (query, query[:, :, :65]):
            whole = Attention(rows, segments, 1.0)
            for lists, made in zip(block_lists(whole, SHAPE), module._make_lists(whole, SHAPE), strict=True):
                assert torch.equal(lists, made)
    one = Attention(query[:1], (Segment(key[:1], key[:1], WINDOW),), 1.0)
    assert all(len(lists) == 1 for lists in block_lists(one, SHAPE))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return result


def test_a_long_window_makes_no_grid_of_tokens():
    """With 65536 tokens, a grid of tokens has 4e9 entries. Tensors here have at most one entry per pair of blocks."""
    length = 1 << 16
    query = torch.empty((1, 1, 1, 1)).expand(1, 1, length, 1)
    with LargestTensor() as largest:
        lists = block_lists(Attention(query, (Segment(query, query, Window(512, 512)),), 1.0), SHAPE)
    assert int((lists.partial_count + lists.full_count).max()) <= 2 + 1024 // 64 + 1
    assert largest.entries == (length // 64) ** 2
