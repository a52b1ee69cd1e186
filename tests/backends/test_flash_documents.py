"""Packed rows on kernels for packed sequences: documents become sequences and need no mask."""

import pytest
import torch

import attnzoo
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.spec.documents import attend_documents, find_documents
from tests.support.attend import RecordingAttend
from tests.support.documents import LENGTHS, ROW, grid_of
from tests.support.half import HALF, heads
from tests.support.models import gpt_neox


@pytest.mark.parametrize("lengths", [(5, 9, 6), (10, 10), (3, -2, 15), (1,) * 20], ids=str)
def test_documents_become_the_sequences_of_one_call(varlen, lengths):
    """Hidden tokens and padding are in no sequence."""
    mask = grid_of(lengths)[:, None].expand(2, -1, -1, -1)
    whole = attnzoo.Attention(heads(20), (attnzoo.Segment(heads(20, seed=1), heads(20, seed=2), mask=mask),), 0.3)
    site = RecordingAttend("flash_attention_2")
    site.backend = FlashBackend(kernel="varlen")
    output = attend_documents(site, whole, find_documents(mask[:, 0], 2)).output
    ((name, call),) = varlen
    real = [length for length in lengths if length > 0]
    ends = [0, *torch.tensor(real * 2).cumsum(0).tolist()]
    assert (name, call["cu_q"].tolist(), call["cu_k"].tolist()) == ("forward", ends, ends)
    assert call["causal"] or max(real) == 1
    expected = RecordingAttend("eager")(whole).output
    assert torch.allclose(output.float(), expected.float(), atol=2e-3)


def test_a_model_runs_a_packed_row(varlen):
    """The backend supports no dense masks, so it can run a packed row only by its documents."""
    model = gpt_neox().to(HALF)
    with torch.no_grad():
        native = model(**ROW).logits
        with attnzoo.patch(model, FlashBackend(kernel="varlen")) as handle:
            patched = model(**ROW).logits
    tokens = [call["cu_q"].tolist()[-1] for _, call in varlen]
    assert sum(tokens) == 2 * sum(LENGTHS), "each token is in one sequence of each layer"
    assert [site.calls for site in handle.sites] == [1, 1]
    assert float((patched - native).abs().max()) < 2e-2 * float(native.abs().max())
