"""GPTBigCode's patched self-attention equals the original."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnzoo
from tests.support.gpt_bigcode import BACKENDS, BOTH, HEADS, KINDS, build, check, results, twin
from tests.support.models import causal_inputs


@KINDS
@BOTH
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_gradients_equal_the_original(multi_query, backend, length, side):
    for implementation in ("eager", "sdpa"):  # they build masks of different formats
        model, inputs = build(implementation, multi_query=multi_query), causal_inputs(length, side)
        reference = results(twin(model, "sdpa", torch.float64), inputs)
        baseline = results(twin(model, "eager"), inputs)
        with attnzoo.patch(model, backend) as handle:
            got = results(model, inputs)
        check(got, reference, baseline)
        assert [site.calls for site in handle.sites] == [1, 1]


@KINDS
@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_sample_of_padding_only_changes_no_other_sample(multi_query, backend, side):
    inputs = causal_inputs(7, side, batch=2)
    empty = {name: torch.cat([value, torch.zeros_like(value[:1])]) for name, value in inputs.items()}
    for implementation in ("eager", "sdpa"):
        model = build(implementation, multi_query=multi_query)
        reference = results(twin(model, "sdpa", torch.float64), inputs)
        baseline = results(twin(model, "eager"), inputs)
        with attnzoo.patch(model, backend):
            got = results(model, empty)
            assert bool(model(**empty).logits.isfinite().all())
        check(got, reference, baseline)


SETTINGS = [
    dict(scale_attn_weights=False),
    dict(attention_softmax_in_fp32=False),
    dict(scale_attention_softmax_in_fp32=False),
    dict(scale_attn_weights=False, attention_softmax_in_fp32=False, scale_attention_softmax_in_fp32=False),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@BOTH
def test_softmax_settings_equal_the_original(settings, dtype, backend):
    inputs = causal_inputs(9, "left", batch=2)
    model = build(**settings).to(dtype)
    reference = results(twin(model, "sdpa", torch.float64), inputs)
    baseline = results(twin(model, "eager", dtype), inputs)
    with attnzoo.patch(model, backend):
        check(results(model, inputs), reference, baseline)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_eager_rounds_as_the_original(settings, dtype):
    """The softmax of half precision is computed in float32 under all settings, so the results are equal bit for bit."""
    inputs = causal_inputs(9, "right", batch=2)
    real = inputs["attention_mask"].bool()
    model = build("eager", **settings).to(dtype)
    with torch.no_grad():
        expected = model(**inputs).logits[real]
        with attnzoo.patch(model, "eager"):
            assert torch.equal(model(**inputs).logits[real], expected)


@KINDS
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_returns_the_original_tokens(multi_query, beams, cache):
    options = dict(max_new_tokens=10, do_sample=False, num_beams=beams, cache_implementation=cache)
    inputs = causal_inputs(6, "left")
    for implementation in ("eager", "sdpa"):
        model = build(implementation, multi_query=multi_query)
        expected = model.generate(**inputs, **options)
        for backend in BACKENDS:
            with attnzoo.patch(model, backend) as handle:
                assert torch.equal(model.generate(**inputs, **options), expected)
            assert all(site.calls >= 10 for site in handle.sites)


@KINDS
@BOTH
def test_dropout_in_training_equals_the_original(multi_query, backend):
    model = build(backend, multi_query=multi_query, attn_pdrop=0.5)
    inputs = causal_inputs(9, "right", batch=2)
    real = inputs["attention_mask"].bool()

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**inputs).logits[real].detach()

    evaluated = run(0)
    model.train()
    expected = run(0)
    with attnzoo.patch(model, backend):
        torch.testing.assert_close(run(0), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(run(0), run(1), atol=0.1)
        model.eval()
        assert torch.equal(run(0), run(1))
        torch.testing.assert_close(run(0), evaluated, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_a_backend_without_dropout_is_refused_in_training(add_backend, cross):
    add_backend("without-dropout", dropout=False)
    model = build(multi_query=False, add_cross_attention=cross, attn_pdrop=0.1).train()
    sites = "*crossattention" if cross else "*"
    with pytest.raises(attnzoo.BackendRefusedError, match="dropout"):
        attnzoo.patch(model, {sites: "without-dropout"})
    attnzoo.patch(model.eval(), {sites: "without-dropout"}).remove()


@KINDS
@pytest.mark.parametrize("requested_by", ["argument", "config"])
def test_output_attentions_equals_the_original(multi_query, requested_by):
    inputs, options = (
        causal_inputs(7, "left", batch=2),
        dict(output_attentions=True) if requested_by == "argument" else {},
    )
    model = build("eager", multi_query=multi_query)
    if requested_by == "config":
        model.config.output_attentions = True
    expected = model(**inputs, **options).attentions
    real = inputs["attention_mask"].bool()
    with attnzoo.patch(model, "eager"):
        got = model(**inputs, **options).attentions
        assert len(got) == len(expected) == 2
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.shape == theirs.shape == (2, HEADS, 7, 7)
            rows = real[:, None, :, None]
            torch.testing.assert_close(ours * rows, theirs * rows, atol=1e-5, rtol=1e-4)
    with attnzoo.patch(model, "sdpa"), pytest.raises(attnzoo.BackendRefusedError, match='backend="eager"'):
        model(**inputs, **options)
    with attnzoo.patch(model, "sdpa", fallback="native") as handle:
        assert torch.equal(model(**inputs, **options).attentions[1], expected[1])
        assert [site.fallbacks for site in handle.sites] == [1, 1]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_output_attentions_after_a_fallback_within_the_forward(add_backend, implementation):
    """Only the call of the attention function shows that there is a mask. sdpa itself returns no weights."""
    add_backend("without-masks", mask=False, key_mask=False)
    model, given = build(implementation), dict(**causal_inputs(7, "left", batch=2), output_attentions=True)
    expected = model(**given).attentions
    with attnzoo.patch(model, "without-masks", fallback="native") as handle:
        got = model(**given).attentions
    assert torch.equal(got[1], expected[1]) if implementation == "eager" else got == expected
    assert [site.fallbacks for site in handle.sites] == [1, 1]


def test_model_loaded_with_another_implementation_is_refused():
    model = build()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(attnzoo.PatchError, match="flash_attention_2"):
        attnzoo.patch(model, "sdpa")
