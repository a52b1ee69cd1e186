"""Packed rows in whole models: the patched model equals the original, however the document boundaries are given.

Without a 2-D mask and a cache, transformers starts a document at each restart of ``position_ids`` and writes the
documents into the 4-D mask. ``eager`` and ``sdpa`` use only that mask.
"""

import pytest
import torch

import attnzoo
from attnzoo.spec import documents, masks
from tests.support.compare import is_close
from tests.support.documents import LENGTHS, POSITIONS, ROW
from tests.support.models import gpt_bigcode, gpt_neox, ids, led

LENGTH = sum(LENGTHS)
ENDS = torch.tensor([0, 5, 12, 13, LENGTH], dtype=torch.int32)
BOUNDARIES = dict(cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS, max_length_q=11, max_length_k=11)
GRID = torch.block_diag(*(torch.ones(length, length).tril() for length in LENGTHS)).bool()[None, None]
MODELS = [(gpt_neox, "sdpa"), (gpt_neox, "eager"), (gpt_bigcode, "sdpa"), (gpt_bigcode, "eager")]


@pytest.fixture(params=MODELS, ids=lambda param: f"{param[0].__name__}-{param[1]}")
def model(request):
    build, implementation = request.param
    model = build()
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture
def maskless(add_backend):
    """A backend without dense masks, like kernels for sequences of varying length."""
    cls = add_backend("maskless", mask=False)
    yield cls.name
    assert not any(segment.mask is not None for attention in cls.runs for segment in attention.segments)


@pytest.mark.parametrize("boundaries", [{}, BOUNDARIES], ids=["positions", "positions and boundaries"])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "auto", "maskless"])
def test_packed_row_equals_the_original(model, backend, boundaries, maskless):
    """Compare forward and backward. Each document also has the same output as alone."""
    native = model(**ROW, labels=ROW["input_ids"])
    native.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with attnzoo.patch(model, backend) as handle:
        patched = model(**ROW, **boundaries, labels=ROW["input_ids"])
        patched.loss.backward()
        alone = [model(tokens).logits for tokens in ROW["input_ids"].split(LENGTHS, dim=1)]
    assert all(site.calls and not site.fallbacks for site in handle.sites)
    assert is_close(patched.logits, native.logits)
    assert is_close(patched.logits, torch.cat(alone, dim=1))
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, parameter in model.named_parameters():
        if name in expected:
            assert float((parameter.grad - expected[name]).abs().max()) < 1e-4 * largest, name


def test_rows_of_a_batch_may_have_different_documents(model, maskless):
    other = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None]
    row = dict(input_ids=ids(2, LENGTH), position_ids=torch.cat([POSITIONS, other]), use_cache=False)
    with torch.no_grad():
        native = model(**row).logits
        for backend in ("sdpa", maskless):
            with attnzoo.patch(model, backend):
                assert is_close(model(**row).logits, native)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "maskless"])
@pytest.mark.parametrize(
    "given",
    [
        dict(BOUNDARIES),
        dict(attention_mask=torch.ones(1, LENGTH, dtype=torch.long), position_ids=POSITIONS),
        dict(attention_mask=torch.ones(1, LENGTH, dtype=torch.long), position_ids=POSITIONS, **BOUNDARIES),
    ],
    ids=["boundaries alone", "positions beside a 2-D mask", "all three"],
)
def test_row_that_the_original_does_not_pack_is_one_document(model, backend, given, maskless):
    """``eager`` and ``sdpa`` ignore explicit boundaries, and transformers ignores positions beside a 2-D mask."""
    row = dict(input_ids=ROW["input_ids"], use_cache=False, **given)
    with torch.no_grad():
        native = model(**row).logits
        packed = model(**ROW).logits
        with attnzoo.patch(model, backend):
            assert is_close(model(**row).logits, native)
    assert not is_close(native, packed)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "maskless"])
@pytest.mark.parametrize("positions", [{}, dict(position_ids=POSITIONS)], ids=["no positions", "positions"])
@pytest.mark.parametrize("grid", [GRID, torch.ones_like(GRID).tril()], ids=["documents", "causal"])
def test_4d_mask_overrides_positions(model, backend, positions, grid, maskless):
    mask = torch.zeros(grid.shape).masked_fill(~grid, torch.finfo(torch.float32).min)
    row = dict(input_ids=ROW["input_ids"], attention_mask=mask, use_cache=False, **positions)
    with torch.no_grad():
        native = model(**row).logits
        with attnzoo.patch(model, backend):
            assert is_close(model(**row).logits, native)


@pytest.mark.parametrize("options", [dict(window=3, sinks=2), dict(window=2)], ids=str)
def test_windows_and_sinks_apply_within_each_document(options):
    """Under a backend that changes the pattern, each document also has the same output as alone."""
    model = gpt_neox()
    with torch.no_grad(), attnzoo.patch(model, "blocked-local", **options):
        packed = model(**ROW).logits
        alone = [model(tokens).logits for tokens in ROW["input_ids"].split(LENGTHS, dim=1)]
    assert is_close(packed, torch.cat(alone, dim=1))


def test_probabilities_of_a_packed_row_cover_the_whole_row(model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        native = model(**ROW, output_attentions=True)
        with attnzoo.patch(model, "eager"):
            patched = model(**ROW, output_attentions=True)
    assert len(native.attentions) == 2
    for got, expected in zip(patched.attentions, native.attentions, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


def test_decoder_of_an_encoder_decoder_supports_documents(maskless):
    model = led()
    row = dict(input_ids=ids(1, 16), decoder_input_ids=ids(1, LENGTH), decoder_attention_mask=GRID, use_cache=False)
    additive = torch.zeros(GRID.shape).masked_fill(~GRID, torch.finfo(torch.float32).min)
    with torch.no_grad():
        native = model(**{**row, "decoder_attention_mask": additive}).logits
        with attnzoo.patch(model, {"*decoder*": maskless, "*": "sdpa"}):
            assert is_close(model(**{**row, "decoder_attention_mask": additive}).logits, native)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_mask_is_read_once_per_forward(implementation, monkeypatch):
    """This holds for any number of layers, and for a bool mask, whose memory the result could share."""
    reads, read = [], documents.find_documents
    monkeypatch.setattr(masks, "find_documents", lambda *args: reads.append(args) or read(*args))
    model = gpt_neox()
    model.set_attn_implementation(implementation)
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        model(**ROW)
    assert len(reads) == 1 < model.config.num_hidden_layers
