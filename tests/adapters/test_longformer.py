"""A patched Longformer or LED calls its projections, also if they are no plain linear layers."""

import pytest
import torch
from torch import nn

import attnzoo
from tests.support.models import led, led_inputs, longformer, longformer_inputs
from tests.support.weights import LowRank, pack, quantise

PROJECTIONS = ("query", "key", "value", "query_global", "key_global", "value_global")
BUILDS = {"led": (led, led_inputs), "longformer": (longformer, longformer_inputs)}


@pytest.fixture(params=BUILDS)
def family(request):
    return BUILDS[request.param]


def attention_of(model):
    return next(module for module in model.modules() if all(hasattr(module, name) for name in PROJECTIONS))


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0][inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("global_tokens", ["zero", "one", "varying", "all"])
@pytest.mark.parametrize("change", [pack, quantise], ids=["only linear()", "quantize_dynamic"])
def test_weights_that_only_support_linear(family, change, global_tokens, backend):
    build, inputs = family
    model, given = build(), inputs(24, "right", global_tokens)
    model = change(model)
    expected = outputs(model, given)
    with attnzoo.patch(model, backend):
        torch.testing.assert_close(outputs(model, given), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("global_tokens", ["one", "all"])
def test_low_rank_layers_change_the_result(family, global_tokens):
    build, inputs = family
    model, given = build(), inputs(24, "right", global_tokens)
    plain, attention = outputs(model, given), attention_of(model)
    for name in PROJECTIONS:
        setattr(attention, name, LowRank(getattr(attention, name)))
    expected = outputs(model, given)
    assert (expected - plain).abs().max() > 0.1
    with attnzoo.patch(model, "sdpa"):
        torch.testing.assert_close(outputs(model, given), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_hooks_on_projections_are_called_once(family, grad, training):
    build, inputs = family
    model, seen = build().train(training), []
    for name in PROJECTIONS:
        getattr(attention_of(model), name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with attnzoo.patch(model, "sdpa"), torch.set_grad_enabled(grad):
        model(**inputs(24, "left", "one"))
    assert sorted(seen) == sorted(PROJECTIONS)


def test_global_hook_sees_the_projections(family):
    build, inputs = family
    model, seen = build(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with attnzoo.patch(model, "sdpa"), torch.no_grad():
            model(**inputs(24, "left", "one"))
    finally:
        hook.remove()
    assert all(getattr(attention_of(model), name) in seen for name in PROJECTIONS)


def test_weights_of_global_tokens_do_not_depend_on_other_samples(family):
    """Samples with fewer global tokens than other samples have unused rows. The weights of unused rows are zero."""
    build, make = family
    model, inputs = build(), make(24, "right")
    counts = inputs["global_attention_mask"].sum(1).tolist()
    with attnzoo.patch(model, "eager"), torch.no_grad():
        returned = model(**inputs, output_attentions=True)
    weights = getattr(returned, "encoder_global_attentions", None) or returned.global_attentions
    assert counts == [0, 1, 2]
    for layer in weights:  # (batch, heads, length, globals)
        for sample, count in enumerate(counts):
            assert not layer[sample, :, :, count:].any()
            assert layer[sample, :, :, :count].sum(1).allclose(torch.ones(()), atol=1e-5)
