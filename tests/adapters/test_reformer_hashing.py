"""Hashing draws one set of rotations, and searches buckets as ``argmax`` does."""

from types import SimpleNamespace

import pytest
import torch

from attnzoo import InvalidArgumentError
from attnzoo.adapters import reformer_hashing
from attnzoo.adapters.reformer_hashing import _FirstLargest, first_largest, hash_queries


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 300])
def test_the_first_largest_number_is_that_of_argmax(dtype, count):
    search = _FirstLargest()
    for scale in (1.0, 2.0):  # twice, because the second call writes to the memory of the first
        x = (torch.randn(2, 3, 40, count) * scale).to(dtype)
        assert torch.equal(search(x), torch.cat([x, -x], -1).argmax(-1))
        assert torch.equal(first_largest(x), search(x))


def test_equal_numbers_give_the_first_index():
    x = torch.randint(-2, 3, (500, 6)).float()
    for search in (_FirstLargest(), first_largest):
        assert torch.equal(search(x), torch.cat([x, -x], -1).argmax(-1))
        assert torch.equal(search(torch.zeros(3, 5)), torch.zeros(3, dtype=torch.long))


def test_a_nan_gives_the_first_index_of_a_nan():
    x = torch.tensor([[1.0, float("nan"), float("nan")], [-5.0, 1.0, float("nan")]])
    assert torch.equal(first_largest(x), torch.cat([x, -x], -1).argmax(-1))


def hasher(**changes):
    return SimpleNamespace(**{"num_buckets": 8, "hash_seed": 3, **changes})


def test_all_slices_use_one_set_of_rotations(monkeypatch):
    drawn, randn = [], torch.randn
    query = torch.randn(1, 2, 4 * reformer_hashing.HASHED_AT_ONCE, 6)
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: drawn.append(args) or randn(*args, **kwargs))
    hash_queries(hasher(), query, 3, None)
    assert drawn == [((2, 6, 3, 4),)]


@pytest.mark.parametrize("number", [7, [4, 3]])
def test_odd_numbers_of_buckets_are_refused(number):
    with pytest.raises(InvalidArgumentError, match=r"config.num_buckets: got .*[73].*; allowed: an even number"):
        hash_queries(hasher(num_buckets=number), torch.randn(1, 2, 800, 6), 1, None)
