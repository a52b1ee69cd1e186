"""Rows moved by number, and masks made from token numbers: against the plain way to say the same."""

import pytest
import torch

from attnzoo.backends.common import rows
from attnzoo.backends.common.additive_masks import TokenMasks
from attnzoo.spec.patterns import SortedChunks

LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(*shape),
    "heads inside": lambda b, h, n, *d: torch.randn(b, n, h, *d).transpose(1, 2),
    "part of a wider one": lambda b, h, n, *d: torch.randn(b, n, 3, h, *d)[:, :, 1].transpose(1, 2),
    "every other row": lambda b, h, n, *d: torch.randn(b, h, 2 * n, *d)[:, :, ::2],
    "not of whole rows": lambda b, h, n, *d: torch.randn(b, h, *d, n).movedim(-1, 2),
    "wider rows": lambda b, h, n, *d: torch.randn(b, h, n, *(size + 1 for size in d))[..., : d[0] if d else None],
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
shapes = pytest.mark.parametrize("shape", [(2, 3, 7, 4), (2, 3, 7), (1, 1, 7, 4), (2, 3, 7, 1), (1, 3, 1, 4)], ids=str)


def places(batch, heads, length):
    return torch.rand(batch, heads, length).argsort(-1)[:, :, : (length + 1) // 2]


def as_many_dimensions(index, tensor):
    return index if tensor.ndim == 3 else index[..., None].expand(-1, -1, -1, tensor.shape[3])


@layouts
@shapes
def test_rows_are_taken_put_back_and_added_like_gather_and_scatter(layout, shape):
    tensor, index = layout(*shape), places(*shape[:3])
    full = as_many_dimensions(index, tensor)
    taken = rows.take(tensor, index)
    assert torch.equal(taken, tensor.gather(2, full))
    values = torch.randn_like(taken).double()
    for move, plain in ((rows.put_, torch.Tensor.scatter_), (rows.add_, torch.Tensor.scatter_add_)):
        expected = plain(tensor.clone(), 2, full, values.float())
        move(tensor, index, values)
        torch.testing.assert_close(tensor, expected)


def test_rows_of_an_expanded_tensor():
    tensor, index = torch.randn(()).expand(2, 3, 7, 4), places(2, 3, 7)
    assert torch.equal(rows.take(tensor, index), tensor[:, :, : index.shape[2]])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("hidden", [0, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_terms_hide_what_the_pattern_hides(causal, hidden, dtype):
    token = torch.rand(2, 3, 9).argsort(-1).repeat(1, 1, 2)
    token = token.masked_fill(token < hidden, -1)
    terms, pattern = TokenMasks(token, causal, dtype), SortedChunks(4, causal=causal)
    for start, stop in ((0, 18), (3, 5), (2, 3)):
        queries = torch.rand(2, 3, 9).argsort(-1)[:, :, :5]
        term, live = terms.of(queries, start, stop)
        seen = pattern.visible(queries[..., None], token[:, :, None, start:stop])
        assert term.dtype == dtype
        assert torch.equal(term == 0, seen)
        assert (term[~seen].double() < -1e29).all()
        assert torch.equal(seen.any(-1), torch.ones_like(queries, dtype=torch.bool) if live is None else live)
