"""Packed rows on every backend: computed by documents, they agree with the oracle on the dense mask."""

from dataclasses import dataclass, field
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, note

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.registry import registry
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.documents import attend_documents
from attnzoo.spec.masks import read_attention_mask
from attnzoo.spec.segments import Attention, Segment
from tests.support.documents import RecordingAttend, grid_of, packed_rows

BACKENDS = [name for name, info in attnzoo.backends().items() if info.available and info.exact]


@dataclass(frozen=True)
class ByDocuments(attnzoo.Backend):
    """Computes an attention by its documents on another backend. The oracle computes it by the dense mask."""

    site: RecordingAttend = field(compare=False)
    documents: tuple = field(compare=False)

    name: ClassVar[str] = "by-documents"
    capabilities: ClassVar[attnzoo.Capabilities] = EagerBackend.capabilities

    def run(self, attention, probabilities=False):
        return attend_documents(self.site, attention, self.documents, probabilities)


@st.composite
def packed_attentions(draw):
    """Rows of documents and a few tokens outside of documents, with grouped heads and maybe a relative bias."""
    batch, kv_heads, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads, dim = kv_heads * ratio, draw(st.sampled_from([8, 16]))
    length = draw(st.one_of(st.integers(2, 40), st.sampled_from([64, 65, 129, 200])))
    mask = grid_of(*draw(packed_rows(batch, length)))[:, None]
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    bias = None
    if draw(st.booleans()):
        width = draw(st.integers(1, 12))
        values = normal(draw(st.sampled_from([1, heads])), width).detach().requires_grad_(draw(st.booleans()))
        bias = RelativeBias(values, zero=draw(st.integers(0, width - 1)))
    query, key, value = normal(batch, heads, length, dim), *(normal(batch, kv_heads, length, dim) for _ in range(2))
    return Attention(query, (Segment(key, value, mask=mask, bias=bias),), dim**-0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@given(attention=packed_attentions(), grad=st.booleans())
def test_documents_agree_with_the_oracle_on_the_dense_mask(backend, attention, grad):
    note(f"{attention.request()}")
    read = read_attention_mask(attention.segments[0].mask, (attention.batch, attention.q_len, attention.q_len))
    site = RecordingAttend(backend)
    if read.documents is None:  # the mask is causality and padding only
        assert read.mask is None
        return
    if registry.refusals(registry.make_backend(backend), read.documents[0].attention(attention).request()):
        return
    report = check_attention("drawn", attention, ByDocuments(site, read.documents), grad=grad, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, report.checks))
    assert all(segment.mask is None for ran in site.ran for segment in ran.segments), "a dense mask was used"
