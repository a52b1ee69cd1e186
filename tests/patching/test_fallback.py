"""A call that the backend refuses raises or, with ``fallback="native"``, runs the model's own code and is counted."""

from __future__ import annotations

import pytest
import torch

import attnzoo
from attnzoo import BackendRefusedError
from tests.support.models import gpt_bigcode, gpt_neox, ids, longt5
from tests.support.subject import calls, mask_with_hole


def test_probabilities_under_a_fused_backend_are_refused_with_the_remedy(subject, snapshot):
    before = snapshot(subject)
    with attnzoo.patch(subject.model, "sdpa") as handle:
        with pytest.raises(BackendRefusedError) as caught:
            subject.logits(output_attentions=True)
        assert "attention probabilities: got True; allowed: output_attentions=False" in str(caught.value)
        assert 'backend="eager"' in str(caught.value)
        assert 'fallback="native"' in str(caught.value)
        assert {site.fallbacks for site in handle.sites} == {0}
    before.assert_unchanged()


def test_eager_returns_probabilities(led):
    with torch.no_grad():
        native = led.model(**led.inputs, output_attentions=True)
        with attnzoo.patch(led.model, "eager"):
            patched = led.model(**led.inputs, output_attentions=True)
    for field in ("decoder_attentions", "cross_attentions", "encoder_attentions", "encoder_global_attentions"):
        assert len(patched[field]) == len(native[field]) > 0
        for got, expected in zip(patched[field], native[field], strict=True):
            if field == "encoder_global_attentions":  # (batch, heads, length, globals); sample 0 has one
                got, expected = got[..., :1], expected[..., :1]
            assert torch.allclose(got[0], expected[0], atol=1e-5), field  # sample 0 has no padding


def test_fallback_runs_the_original_and_counts_it(led):
    with torch.no_grad():
        native = led.model(**led.inputs, output_attentions=True)
        with attnzoo.patch(led.model, "sdpa", fallback="native") as handle:
            patched = led.model(**led.inputs, output_attentions=True)
            assert {(site.calls, site.fallbacks, site.kernel) for site in handle.sites} == {(0, 1, None)}
            led.logits()
            assert {site.fallbacks for site in handle.sites} == {1}
            assert sum(calls(handle).values()) == led.attentions
    assert torch.equal(patched.logits, native.logits)
    for field in ("decoder_attentions", "cross_attentions", "encoder_attentions", "encoder_global_attentions"):
        assert all(map(torch.equal, patched[field], native[field])), field


def test_fallback_over_another_patch_runs_the_models_own_code(led):
    with torch.no_grad():
        native = led.model(**led.inputs, output_attentions=True).logits
        with attnzoo.patch(led.model, "eager") as below, attnzoo.patch(led.model, "sdpa", fallback="native"):
            assert torch.equal(led.model(**led.inputs, output_attentions=True).logits, native)
    assert set(calls(below).values()) == {0}, "native was asked for and eager ran"


@pytest.mark.parametrize(
    ("build", "implementation"),
    [(gpt_neox, "sdpa"), (gpt_neox, "eager"), (gpt_bigcode, "sdpa"), (gpt_bigcode, "eager"), (longt5, "eager")],
)
def test_fallback_returns_the_probabilities_of_the_original_or_none(build, implementation):
    """A model loaded with sdpa returns no probabilities, unpatched and under a fallback."""
    model = build()
    model.set_attn_implementation(implementation)
    inputs = dict(input_ids=ids(2, 9), **(dict(decoder_input_ids=ids(2, 5)) if build is longt5 else {}))
    with torch.no_grad():
        native = model(**inputs, output_attentions=True)
        with attnzoo.patch(model, "sdpa", fallback="native") as handle:
            patched = model(**inputs, output_attentions=True)
            assert {(site.calls, site.fallbacks) for site in handle.sites} == {(0, 1)}
        with attnzoo.patch(model, "sdpa"), pytest.raises(BackendRefusedError, match="attention probabilities"):
            model(**inputs, output_attentions=True)
    assert list(patched) == list(native)
    for field in (field for field in native if "attentions" in field):
        assert len(patched[field]) == len(native[field]), field
        pairs = zip(patched[field], native[field], strict=True)
        assert all(torch.equal(*pair) if None not in pair else pair == (None, None) for pair in pairs), field
    assert torch.equal(patched.logits, native.logits)


def test_fallback_serves_requests_that_are_refused_at_patch_time(led, add_backend):
    native = led.logits()
    fake = add_backend("one-segment", segments=1)
    with attnzoo.patch(led.model, "one-segment", fallback="native") as handle:
        assert led.close(led.logits(), native)
    assert [(site.calls, site.fallbacks) for site in handle.sites] == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert len(fake.runs) == 2


def test_fallback_serves_requests_that_depend_on_inputs(neox, add_backend):
    """Only the forward can see a dense mask. A refusal inside the forward falls back, too."""
    native = neox.logits(**mask_with_hole(neox))
    add_backend("maskless", mask=False)
    with attnzoo.patch(neox.model, "maskless", fallback="native") as handle:
        assert torch.equal(neox.logits(**mask_with_hole(neox)), native)
    assert {(site.calls, site.fallbacks) for site in handle.sites} == {(0, 1)}


def test_a_refusal_inside_a_replaced_forward_raises_because_its_cache_is_filled(led, add_backend):
    decoder, fake = led.model.led.decoder, add_backend("maskless", mask=False)
    length = led.inputs["decoder_input_ids"].shape[1]
    grid = torch.ones(length, length, dtype=torch.bool).tril()
    grid[2:, 1] = False
    with attnzoo.patch(decoder, "maskless", fallback="native") as handle:
        with pytest.raises(BackendRefusedError, match="mask: got True; allowed: no dense mask"):
            led.logits(decoder_attention_mask=torch.where(grid, 0.0, -torch.inf).expand(3, 1, -1, -1))
        assert not fake.runs
    assert {site.fallbacks for site in handle.sites} == {0}


def test_fallback_serves_gradients_in_eval_mode(subject, add_backend):
    native = subject.model(**subject.inputs).logits
    add_backend("forward-only", grad=False)
    with attnzoo.patch(subject.model, "forward-only", fallback="native") as handle:
        logits = subject.model(**subject.inputs).logits
        assert logits.requires_grad
        assert torch.equal(logits, native)
    assert {(site.calls, site.fallbacks) for site in handle.sites} == {(0, 1)}


def test_a_mask_that_a_backend_does_not_support_is_refused(neox, add_backend):
    fake = add_backend("maskless", mask=False)
    with attnzoo.patch(neox.model, "maskless") as handle:
        with pytest.raises(BackendRefusedError, match="mask: got True; allowed: no dense mask"):
            neox.logits(**mask_with_hole(neox))
        assert not fake.runs and set(calls(handle).values()) == {0}
        neox.logits()  # padding and causality are read from the mask, so that it is not dense
        assert set(calls(handle).values()) == {1}
