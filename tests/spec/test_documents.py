"""Packed rows: masks that are read as documents, and attention by documents."""

from dataclasses import replace
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import attnzoo
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec import documents as documents_module
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.documents import attend_documents, find_documents
from attnzoo.spec.masks import read_attention_mask
from attnzoo.spec.segments import Attention, Segment
from tests.support.attend import RecordingAttend
from tests.support.documents import grid_of, packed_rows


def mask_of(documents, batch, length):
    """Return the mask ``(batch, length, length)`` that documents show."""
    number = torch.full((batch * length,), -1)
    for pack in documents:
        real = torch.ones_like(pack.index, dtype=torch.bool) if pack.real is None else pack.real
        for tokens, is_real in zip(pack.index, real, strict=True):
            assert bool((number[tokens[is_real]] == -1).all()), "a token is in two documents"
            number[tokens[is_real]] = tokens[0]
    number = number.view(batch, length)
    same_document = (number[:, :, None] == number[:, None]) & (number >= 0)[:, None]
    return same_document & torch.ones(length, length, dtype=torch.bool).tril()


def find_in_pages(data, grid, batch):
    """Find documents in a mask that is read in whole, or in pages of a few entries."""
    entries = data.draw(st.sampled_from([1 << 24, 1, 40, 300]))
    with mock.patch.object(documents_module, "_ENTRIES_AT_ONCE", entries):
        return find_documents(grid, batch)


@given(data=st.data())
def test_find_documents_gives_exactly_the_mask(data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    grid = grid_of(*data.draw(packed_rows(batch, length)))
    documents = find_in_pages(data, grid, batch)
    if not bool(grid.any()):
        assert documents is None
        return
    assert torch.equal(mask_of(documents, batch, length), grid)


@given(data=st.data())
def test_a_mask_with_one_changed_entry_is_never_read_as_another_mask(data):
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 12))
    grid = grid_of(*data.draw(packed_rows(batch, length)))
    place = tuple(data.draw(st.integers(0, size - 1)) for size in grid.shape)
    grid[place] = ~grid[place]
    documents = find_in_pages(data, grid, batch)
    assert documents is None or torch.equal(mask_of(documents, batch, length), grid)


@pytest.mark.parametrize(
    "grid",
    [
        torch.ones(1, 6, 6, dtype=torch.bool),
        grid_of((3, 3)).transpose(1, 2),
        (torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)) > 0)[None],
        torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)[None],
        torch.ones(1, 4, 6, dtype=torch.bool).tril(),
    ],
    ids=["full", "anticausal", "bidirectional documents", "a window", "more keys than queries"],
)
def test_find_documents_gives_none_for_other_masks(grid):
    assert find_documents(grid, 1) is None


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_masks_of_packed_rows_are_read_as_documents(additive):
    grid = grid_of((3, 4, 2), (9,))[:, None]
    given = torch.zeros(grid.shape).masked_fill(~grid, torch.finfo(torch.float32).min) if additive else grid
    read = read_attention_mask(given, (2, 9, 9))
    assert torch.equal(read.mask, grid), "adapters that do not know documents need the mask"
    assert torch.equal(mask_of(read.documents, 2, 9), grid[:, 0])


def test_a_mask_for_the_whole_batch_gives_documents_for_every_sample():
    read = read_attention_mask(grid_of((2, 5))[:, None], (3, 7, 7))
    assert torch.equal(mask_of(read.documents, 3, 7), grid_of((2, 5)).expand(3, -1, -1))


def test_masks_per_head_and_causal_masks_give_no_documents():
    by_head = grid_of((2, 5)).expand(2, -1, -1)[None]
    assert read_attention_mask(by_head, (1, 7, 7)).documents is None
    assert read_attention_mask(grid_of((7,))[:, None], (1, 7, 7)).documents is None


def test_padding_at_most_doubles_long_documents():
    lengths = (300, 3, 5, 70, 90, 64, 1, 128, 129, 2)
    packs = find_documents(grid_of(lengths), 1)
    for pack in packs:
        longest = pack.index.shape[1]
        counts = [longest] * len(pack.index) if pack.real is None else pack.real.sum(1).tolist()
        assert longest <= 64 or all(2 * count >= longest for count in counts)
    assert len(packs) == 4, "up to 64, 65 to 128, 129 to 256, and 257 to 512 tokens"


def packed_attention(bias=None):
    """Return an attention over two rows with documents of 5 and 4, and of 9 tokens, and its documents."""
    random = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 2, 9, 8, generator=random, dtype=torch.float64) for _ in range(3))
    mask = grid_of((5, 4), (9,))[:, None]
    documents = read_attention_mask(mask, (2, 9, 9)).documents
    return Attention(query, (Segment(key, value, mask=mask, bias=bias),), 0.3), documents


RELATIVE = RelativeBias(torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), zero=4)


@pytest.mark.parametrize("bias", [None, RELATIVE], ids=["no bias", "by distance"])
def test_each_document_is_a_sample(bias):
    attention, documents = packed_attention(bias)
    site = RecordingAttend("eager")
    result = attend_documents(site, attention, documents)
    assert torch.allclose(result.output, execute(registry.make_backend("eager"), attention).output, atol=1e-12)
    assert [tuple(attention.query.shape) for attention in site.ran] == [(3, 2, 9, 8)]
    assert all(segment.mask is None for attention in site.ran for segment in attention.segments)


KEEPING_THE_MASK = {
    "dense bias": dict(bias=DenseBias(torch.zeros(1, 1, 9, 9, dtype=torch.float64))),
    "shifted bias": dict(bias=RelativeBias(RELATIVE.values, zero=4, offset=2)),
    "placed bias": dict(bias=RelativeBias(RELATIVE.values, zero=4, positions=torch.arange(9).repeat(2, 1))),
    "refused documents": dict(takes=False),
    "probabilities": dict(probabilities=True),
    "no documents": dict(packed=False),
}


@pytest.mark.parametrize("case", KEEPING_THE_MASK.values(), ids=KEEPING_THE_MASK)
def test_an_attention_that_documents_cannot_replace_keeps_its_mask(case):
    attention, documents = packed_attention(case.get("bias"))
    site, probabilities = RecordingAttend("eager", case.get("takes", True)), case.get("probabilities", False)
    result = attend_documents(site, attention, documents if case.get("packed", True) else None, probabilities)
    assert site.ran == [attention]
    assert not probabilities or result.probabilities[0].shape == (2, 2, 9, 9)


@pytest.mark.parametrize("term", ["query_mask", "key_mask", "empty"])
def test_an_attention_with_another_term_keeps_its_mask(term):
    """Such a term would have to be cut into documents, too."""
    attention, documents = packed_attention()
    hides = torch.arange(9).expand(2, -1) != 6
    if term == "key_mask":
        attention = replace(attention, segments=(replace(attention.segments[0], key_mask=hides),))
    else:
        attention = replace(attention, **{term: hides if term == "query_mask" else torch.randn_like(attention.query)})
    site = RecordingAttend("eager")
    assert torch.equal(
        attend_documents(site, attention, documents).output,
        execute(registry.make_backend("eager"), attention).output,
    )
    assert site.ran == [attention]


def test_tokens_outside_of_documents_get_zero():
    mask = grid_of((3, -2, 4), (-9,))[:, None]
    documents = read_attention_mask(mask, (2, 9, 9)).documents
    query, key, value = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64)
    attention = Attention(query, (Segment(key, value, mask=mask),), 0.3)
    output = attend_documents(RecordingAttend("sdpa"), attention, documents).output
    torch.testing.assert_close(output, execute(registry.make_backend("eager"), attention).output)
    assert not output[0, :, 3:5].any() and not output[1].any()


def test_documents_change_neither_pattern_nor_key_mask():
    """Third-party adapters that read ``pattern``, ``key_mask``, ``mask`` and ``bias`` need not know about documents."""
    read = attnzoo.read_attention_mask(grid_of((2, 5))[:, None], (1, 7, 7))
    assert (read.pattern, read.key_mask) == (attnzoo.Full(), None)
