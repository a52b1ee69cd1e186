"""Masks of models: causality and padding become a pattern and a key mask, other masks stay dense."""

import pytest
import torch

import attnzoo
from attnzoo.spec import documents, masks
from attnzoo.spec.bias import DenseBias
from attnzoo.spec.masks import NO_MASK, read_attention_mask, read_dense_mask
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Segment

KEYS, NEW = 11, 4


@pytest.fixture(autouse=True, params=[None, 3 * 2 * KEYS], ids=["all rows at once", "two rows at a time"])
def entries_at_once(request, monkeypatch):
    """Read masks of three samples in whole, and in several pages."""
    for module in (masks, documents) if request.param else ():
        monkeypatch.setattr(module, "_ENTRIES_AT_ONCE", request.param)


def causal(q_len, kv_len, offset):
    return torch.arange(kv_len) <= torch.arange(q_len)[:, None] + offset


def padding(side):
    real = torch.ones((3, KEYS), dtype=torch.bool)
    real[0, : 3 if side == "left" else None] = side == "none"
    if side == "right":
        real[0, :] = True
        real[0, -3:] = False
    return real


def visible_in(read, q_len, kv_len, batch=3):
    """Return the mask ``(batch, 1, q_len, kv_len)`` that a :class:`ReadMask` shows."""
    zero = torch.zeros((), dtype=torch.long)
    seen = read.pattern.mask_mod(q_len, kv_len)(zero, zero, torch.arange(q_len)[:, None], torch.arange(kv_len))
    seen = seen.expand(batch, 1, q_len, kv_len)
    for part in (None if read.key_mask is None else read.key_mask[:, None, None], read.mask):
        seen = seen if part is None else seen & part
    return seen


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("q_len", "offset", "pattern"),
    [
        (KEYS, 0, attnzoo.Causal(0)),
        (NEW, KEYS - NEW, attnzoo.Causal()),
        (NEW, 0, attnzoo.Causal(0)),
        (NEW, 2, attnzoo.Causal(2)),
        (KEYS, KEYS, attnzoo.Full()),
        (1, KEYS, attnzoo.Full()),
    ],
    ids=["prefill", "new tokens", "static cache, empty", "static cache, filled", "bidirectional", "decoding"],
)
def test_causality_and_padding_become_pattern_and_key_mask(q_len, offset, pattern, side, additive):
    visible = (causal(q_len, KEYS, offset) & padding(side)[:, None])[:, None]
    given = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min) if additive else visible
    read = read_attention_mask(given, (3, q_len, KEYS))
    assert (read.pattern, read.mask, read.bias) == (pattern, None, None)
    assert torch.equal(visible_in(read, q_len, KEYS), visible)
    # Keys after the last query of a causal mask may count as padding or not: no query sees them.
    assert read.key_mask is not None or bool((padding(side) | (torch.arange(KEYS) >= q_len + offset)).all())


def test_a_mask_for_the_whole_batch_gives_a_key_mask_per_sample():
    read = read_attention_mask(padding("left")[:1, None, None].expand(-1, -1, KEYS, -1), (3, KEYS, KEYS))
    assert tuple(read.key_mask.shape) == (3, KEYS)


@pytest.mark.parametrize("where", [(0, 0, 5, 2), (2, 0, 10, 3), (1, 0, 0, 9), (0, 0, 0, 10), (2, 0, 10, 0)])
def test_a_causal_mask_with_one_changed_entry_stays_dense(where):
    visible = causal(KEYS, KEYS, 0).expand(3, 1, -1, -1).clone()
    visible[where] = ~visible[where]
    read = read_attention_mask(visible, (3, KEYS, KEYS))
    assert read.pattern == attnzoo.Full()
    assert torch.equal(visible_in(read, KEYS, KEYS), visible)
    assert read.mask is not None


def test_a_mask_per_head_stays_dense():
    visible = causal(KEYS, KEYS, 0).expand(3, 2, -1, -1)
    assert torch.equal(read_attention_mask(visible, (3, KEYS, KEYS)).mask, visible)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_a_mask_with_one_row_for_all_queries_is_a_key_mask(additive):
    given = padding("left")[:, None, None]
    hidden = torch.zeros(given.shape).masked_fill(~given, float("-inf"))
    read = read_attention_mask(hidden if additive else given, (3, NEW, KEYS))
    assert (read.pattern, read.mask, read.bias) == (attnzoo.Full(), None, None)
    assert torch.equal(read.key_mask, padding("left"))


def test_finite_values_of_an_additive_mask_become_a_bias():
    given = torch.zeros((3, 1, KEYS, KEYS)).masked_fill(~causal(KEYS, KEYS, 0), float("-inf"))
    given[0, 0, 4, 1] = -2.5
    read = read_attention_mask(given, (3, KEYS, KEYS))
    assert read.pattern == attnzoo.Causal(0)
    assert read.bias.values[0, 0, 4, 1] == -2.5
    assert read.bias.values.count_nonzero() == 1


FLOOR = torch.finfo(torch.float32).min / 2


@pytest.mark.parametrize(
    ("value", "floor", "hides"),
    [
        (FLOOR, None, True),
        (FLOOR * 0.99, None, False),
        (float("-inf"), None, True),
        (-1e9, None, False),
        (-1e9, -1e9, True),
        (-0.9e9, -1e9, False),
        (-10000.0, -10000.0, True),
        (float("-inf"), -10000.0, True),
    ],
)
def test_an_additive_value_up_to_the_floor_hides_its_key(value, floor, hides):
    given = torch.zeros((1, 1, KEYS, KEYS))
    given[..., 4] = value
    read = read_attention_mask(given, (1, KEYS, KEYS), floor)
    if hides:
        assert read.bias is None and read.key_mask.tolist() == [[key != 4 for key in range(KEYS)]]
    else:
        assert read.key_mask is None and read.bias.values[0, 0, 3, 4] == value
    assert read.mask is None


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_what_is_read_shares_no_memory_with_the_mask(additive):
    """A cached result must not change if the model writes to its mask."""
    visible = torch.rand(3, 1, KEYS, KEYS) < 0.5
    given = torch.zeros(visible.shape).masked_fill(~visible, float("-inf")) if additive else visible.clone()
    read = read_attention_mask(given, (3, KEYS, KEYS))
    given.zero_() if additive else given.fill_(True)
    assert torch.equal(read.mask, visible)


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(3, KEYS),
        torch.ones((3, 1, KEYS, KEYS), dtype=torch.long),
        torch.ones((2, 1, KEYS, KEYS), dtype=torch.bool),
        torch.ones((3, 1, KEYS, KEYS + 1), dtype=torch.bool),
        torch.full((3, 1, KEYS, KEYS), float("nan")),
        torch.full((3, 1, KEYS, KEYS), float("inf")),
    ],
    ids=["2-D", "long", "another batch", "another length", "NaN", "Inf"],
)
def test_a_mask_of_wrong_shape_dtype_or_value_is_refused(given):
    with pytest.raises(attnzoo.InvalidArgumentError, match="attention_mask"):
        read_attention_mask(given, (3, KEYS, KEYS))


@pytest.mark.parametrize("sizes", [(0, 4, 4), (3, 0, 4), (3, 4, 0)])
def test_an_empty_mask_is_refused(sizes):
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"attention_mask: got .*0.*; allowed"):
        read_attention_mask(torch.ones((sizes[0], 1, *sizes[1:]), dtype=torch.bool), sizes)


def banded(q_len, kv_len, lowest, highest):
    distance = torch.arange(kv_len) - torch.arange(q_len)[:, None]
    return (distance >= lowest) & (distance <= highest)


@pytest.mark.parametrize(
    ("q_len", "lowest", "highest", "pattern"),
    [
        (KEYS, -3, 0, attnzoo.Window(3, 0)),
        (KEYS, -2, 2, attnzoo.Window(2, 2)),
        (KEYS, 0, 1, attnzoo.Window(0, 1)),
        (NEW, 4, 7, attnzoo.Window(3, 0)),  # new tokens on a cache
        (NEW, 1, 3, attnzoo.Window(2, 0, offset=3)),  # the cache has room for more tokens
    ],
)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_band_becomes_a_window(q_len, lowest, highest, pattern, side):
    real = padding(side)
    mask = (banded(q_len, KEYS, lowest, highest) & real[:, None])[:, None]
    read = read_attention_mask(mask, (3, q_len, KEYS))
    assert (read.pattern, read.mask) == (pattern, None)
    assert torch.equal(visible_in(read, q_len, KEYS), mask)


def test_a_band_with_one_changed_entry_stays_dense():
    mask = banded(KEYS, KEYS, -3, 0)
    mask[6, 4] = False
    read = read_attention_mask(mask[None, None], (1, KEYS, KEYS))
    assert read.pattern == attnzoo.Full()
    assert torch.equal(read.mask[0, 0], mask)


def test_a_diagonal_stays_dense():
    read = read_attention_mask(torch.eye(KEYS, dtype=torch.bool)[None, None], (1, KEYS, KEYS))
    assert torch.equal(visible_in(read, KEYS, KEYS, 1)[0, 0], torch.eye(KEYS, dtype=torch.bool))


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_under_vmap_a_mask_stays_dense(additive):
    """Python cannot read the values of a mask that vmap maps over."""
    visible = torch.rand(2, 3, 1, NEW, KEYS) < 0.7
    given = torch.zeros(visible.shape).masked_fill(~visible, -1e9) if additive else visible
    reads = []

    def read(mask):
        reads.append(read_attention_mask(mask, (3, NEW, KEYS), floor=-1e8))
        return reads[-1].mask

    assert torch.equal(torch.func.vmap(read)(given), visible)
    (read,) = reads
    assert (read.pattern, read.key_mask, read.documents) == (attnzoo.Full(), None, None)
    assert (read.bias is not None) == additive


@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (2, 1, 1, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("mask", [torch.ones, torch.zeros], ids=["bool", "additive"])
def test_a_mask_that_hides_nothing_is_no_mask(shape, mask):
    given = mask(shape, dtype=torch.bool if mask is torch.ones else torch.float32)
    assert read_attention_mask(given, (2, shape[2], 7)) == NO_MASK


@pytest.mark.parametrize("samples", [1, 2])
def test_the_mask_of_one_query_is_a_key_mask(samples):
    visible = torch.arange(7 * samples).reshape(samples, 1, 1, 7) % 3 > 0
    for given in (visible, torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)):
        read = read_attention_mask(given, (2, 1, 7))
        assert torch.equal(read.key_mask, visible[:, 0, 0].expand(2, -1))
        assert (read.pattern, read.mask, read.bias, read.documents) == (Full(), None, None, None)


def test_an_additive_mask_of_one_query_that_hides_nothing_is_a_bias():
    read = read_attention_mask(torch.full((1, 1, 1, 7), -0.5), (2, 1, 7))
    assert (read.key_mask, read.mask) == (None, None) and torch.equal(read.bias.values, torch.full((1, 1, 1, 7), -0.5))


def test_a_dense_mask_of_a_segment_becomes_a_pattern():
    """A graph of a compiler passes masks on as dense masks, and the rest of an additive mask as a bias."""
    key = torch.randn(3, 2, KEYS, 4)
    real = padding("right")
    dense = (causal(KEYS, KEYS, 0) & real[:, None])[:, None]
    zeros = torch.zeros(3, 1, KEYS, KEYS)
    read = read_dense_mask(Segment(key, key, Full(), None, dense, DenseBias(zeros)), 3)
    assert (read.pattern, read.mask, read.bias) == (Causal(offset=0), None, None)
    assert torch.equal(read.key_mask, real)
    trained = DenseBias(zeros.clone().requires_grad_())
    assert read_dense_mask(Segment(key, key, Full(), None, dense, trained), 3).bias is trained
    cross = read_dense_mask(Segment(key, key, Full(cross=True), None, real[:, None, None].expand(-1, -1, KEYS, -1)), 3)
    assert (cross.pattern, cross.mask) == (Full(cross=True), None)
    free = torch.rand(3, 1, KEYS, KEYS) < 0.5
    assert read_dense_mask(Segment(key, key, Full(), None, free), 3).mask is not None
