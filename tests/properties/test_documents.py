"""Packed rows on every backend: computed by documents, they agree with the oracle on the dense mask."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, note

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.registry import registry
from attnzoo.spec.documents import attend_documents
from attnzoo.spec.masks import read_attention_mask
from tests.support.attend import RecordingAttend
from tests.support.documents import packed_attentions
from tests.support.drawn_attentions import EVERYTHING
from tests.support.small_blocks import block_sizes


@dataclass(frozen=True)
class ByDocuments(attnzoo.Backend):
    """Computes an attention by its documents on another backend. The oracle computes it by the dense mask."""

    site: RecordingAttend = field(compare=False)
    documents: tuple = field(compare=False)

    name: ClassVar[str] = "by-documents"
    capabilities: ClassVar[attnzoo.Capabilities] = EagerBackend.capabilities

    def run(self, attention, probabilities=False):
        return attend_documents(self.site, attention, self.documents, probabilities)


def documents_of(attention):
    """Return the documents of packed rows. None means that the mask contains only causality and padding."""
    read = read_attention_mask(attention.segments[0].mask, (attention.batch, attention.q_len, attention.q_len))
    assert (read.documents is None) == (read.mask is None)
    return read.documents


@given(st.data(), st.booleans(), st.booleans())
def test_documents_agree_with_the_oracle_on_the_dense_mask(subject_or_oracle, data, grad, are_small):
    subject, grad = subject_or_oracle, grad and subject_or_oracle.grad
    attention = data.draw(packed_attentions(subject.backend.capabilities, subject.limits.get("dims", (8, 16))))
    note(f"{attention.request()}")
    site = RecordingAttend(subject.backend)
    with block_sizes(are_small):
        documents = documents_of(attention)
        if documents is None:
            return
        with torch.set_grad_enabled(grad):
            if registry.refusals(subject.backend, documents[0].attention(attention).request()):
                return
        report = check_attention("drawn", attention, ByDocuments(site, documents), grad=grad, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, report.checks))
    assert all(segment.mask is None for ran in site.ran for segment in ran.segments), "a dense mask was used"


@pytest.mark.parametrize(
    "backend",
    [
        registry.make_backend("lsh", num_hashes=2, chunk_length=4, num_buckets=4, inner="sdpa"),
        registry.make_backend("blocked-local", window=5, sinks=2, inner="sdpa"),
    ],
    ids=lambda backend: backend.name,
)
@given(attention=packed_attentions(replace(EVERYTHING, bias=frozenset(), dtypes=frozenset({torch.float64}))))
def test_an_approximate_backend_changes_documents_as_it_changes_the_dense_mask(backend, attention):
    """Hash rounds and sinks of a document do not depend on the other documents of the row."""
    documents = documents_of(attention)
    if documents is None:
        return
    by_documents = attend_documents(RecordingAttend(backend), attention, documents).output
    torch.testing.assert_close(by_documents, backend.run(attention).output, rtol=0, atol=1e-12)
