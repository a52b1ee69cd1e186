"""Packed rows: their masks and their documents."""

import hypothesis.strategies as st
import torch

from attnzoo.spec.segments import FLOATS, Attention, Segment
from tests.support.drawn_attentions import EVERYTHING, Tensors, relative_biases, sizes
from tests.support.models import ids

LENGTHS = (5, 7, 1, 11)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
ROW = dict(input_ids=ids(1, sum(LENGTHS)), position_ids=POSITIONS, use_cache=False)


def grid_of(*samples):
    """Return the mask ``(samples, length, length)`` of packed rows, given document lengths; negative: hidden tokens."""

    def block(length):
        return torch.ones(length, length).tril() if length > 0 else torch.zeros(-length, -length)

    return torch.stack([torch.block_diag(*map(block, lengths)).bool() for lengths in samples])


@st.composite
def packed_rows(draw, batch, length):
    """Draw document lengths for each sample; negative lengths are hidden tokens."""
    samples = []
    for _ in range(batch):
        lengths, left = [], length
        while left:
            count = draw(st.one_of(st.integers(1, left), st.integers(1, min(left, 3))))
            hidden = draw(st.integers(0, 5)) == 0
            lengths.append(-count if hidden else count)
            left -= count
        samples.append(tuple(lengths))
    return tuple(samples)


@st.composite
def packed_attentions(draw, capabilities=EVERYTHING, dims=(8, 16)):
    """Draw rows of documents and a few tokens outside of documents, with grouped heads and maybe a relative bias."""
    size = draw(sizes(capabilities, dims, equal_lengths=True))
    mask = grid_of(*draw(packed_rows(size.batch, size.kv_len)))[:, None]
    dtype = draw(st.sampled_from([dtype for dtype in FLOATS if dtype in capabilities.dtypes]))
    tensors = Tensors(draw(st.integers(0, 2**16)), dtype, is_strided=draw(st.booleans()))
    query = tensors.normal(size.batch, size.heads, size.q_len, size.dim)
    key, value = tensors.keys_values(size)
    bias = None
    if capabilities.bias and draw(st.booleans()):
        bias = draw(relative_biases(size, tensors, by_distance=True))
    return Attention(query, (Segment(key, value, mask=mask, bias=bias),), size.dim**-0.5)
