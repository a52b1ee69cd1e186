"""The neighbourhoods of chunks and the layout of weights equal those of the original code, written as plain loops."""

from types import SimpleNamespace

import pytest
import torch

import attnzoo
from attnzoo.adapters.reformer_layout import check_length, in_chunks, neighbourhoods, steps_ahead, with_own_token


def module(before, after, chunk=4):
    return SimpleNamespace(num_chunks_before=before, num_chunks_after=after, chunk_length=chunk)


def chunks_of_the_original(number, before, after, count):
    """The chunks that chunk ``number`` sees: the original joins two slices of the list of chunks."""
    chunks = list(range(count))
    return [(chunks[i:] + chunks[:i])[number] if i else number for i in range(-before, after + 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (2, 1), (1, 1), (3, 2), (5, 0), (0, 4)])
def test_steps_lead_to_the_chunks_of_the_original(before, after, count):
    steps = steps_ahead(module(before, after), count)
    for number in range(count):
        assert [(number + step) % count for step in steps] == chunks_of_the_original(number, before, after, count)
    seen = [ahead for first, last in neighbourhoods(module(before, after), count) for ahead in range(-first, last + 1)]
    assert seen == steps, "the segments show the same chunks, each as often"


def test_a_neighbourhood_is_one_segment_unless_it_repeats_a_chunk():
    assert neighbourhoods(module(1, 1), 3) == [(1, 1)]
    assert neighbourhoods(module(1, 1), 2) == [(1, -1), (0, 0), (-1, 1)]
    assert steps_ahead(module(2, 1), 2) == [0, -1, 0, 1]


@pytest.mark.parametrize(("length", "copies", "count"), [(8, 1, 2), (6, 2, 3), (4, 3, 3)])
def test_number_of_chunks(length, copies, count):
    assert check_length(module(1, 0), length, copies) == count


@pytest.mark.parametrize(("length", "copies"), [(6, 1), (5, 2)])
def test_length_with_a_partial_chunk_is_refused(length, copies):
    with pytest.raises(
        attnzoo.InvalidArgumentError, match=f"{length} tokens; allowed: a multiple of the chunk length 4"
    ):
        check_length(module(1, 0), length, copies)


@pytest.mark.parametrize("parts", [1, 3], ids=["one tensor", "one tensor per chunk"])
def test_weights_of_a_neighbourhood_in_chunks(parts):
    length, chunk, ahead = 6, 2, [-1, 0, 1]
    dense = tuple(torch.rand(2, 3, length, length) for _ in range(parts))
    got = in_chunks(dense, chunk, ahead)
    assert got.shape == (2, 3, 3, 2, 6)
    for number in range(3):
        for place, step in enumerate(ahead):
            weights = dense[place if parts > 1 else 0]
            first = (number + step) % 3 * chunk
            rows = weights[:, :, number * chunk : (number + 1) * chunk, first : first + chunk]
            assert torch.equal(got[:, :, number, :, place * chunk : (place + 1) * chunk], rows)


def test_query_that_sees_no_other_token_has_its_weight_on_its_token():
    weights = torch.tensor([[0.1, 0.3, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    share = torch.tensor([[0.8], [0.0], [0.0]])
    own = torch.tensor([[True, False, False], [False, True, False], [True, False, True]])
    got = with_own_token(weights, share, own)
    assert torch.allclose(got, torch.tensor([[0.125, 0.375, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]))
    assert got.dtype == weights.dtype
