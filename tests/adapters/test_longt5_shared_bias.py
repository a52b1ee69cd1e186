"""LongT5's first layer computes the bias of all layers, also if some layers are unpatched or copied, or fall back."""

import copy

import pytest
import torch

import attnzoo
from attnzoo.conformance.error_rule import GRADIENT
from attnzoo.errors import BackendRefusedError
from tests.support.compare import assert_obeys_the_error_rule
from tests.support.longt5 import RADIUS, TABLES, assert_equal_to_the_original, backends, inputs, kinds, longt5, outcome

MIXTURES = {
    "the first layer": {"encoder.block.0*": "sdpa", "decoder.block.0*": "sdpa"},
    "a later layer": {"encoder.block.1*": "sdpa", "decoder.block.1*": "sdpa"},
    "all but the first": {"*.block.0.*": "native", "*": "sdpa"},
    "several backends": {"*.block.1.*": "eager", "*": "sdpa"},
    "only cross": {"*EncDecAttention": "sdpa"},
}


@kinds
@pytest.mark.parametrize("patch", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("length", [3, 37])
def test_patched_and_unpatched_layers_share_the_bias(kind, patch, length):
    assert_equal_to_the_original(longt5(kind), inputs(length), patch)


@kinds
@pytest.mark.parametrize("layer", [0, 1])
def test_second_patch_may_run_original_code_in_one_layer(kind, layer):
    model, arguments = longt5(kind), inputs(37)
    real = arguments["decoder_attention_mask"].bool()
    with torch.no_grad():
        expected = model(**arguments).logits
        with attnzoo.patch(model, "sdpa"), attnzoo.patch(model, {f"*.block.{layer}.*": "native"}):
            got = model(**arguments).logits
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-4)


@kinds
def test_part_of_a_stack_can_be_patched(kind):
    model, arguments = longt5(kind), inputs(37)
    real = arguments["decoder_attention_mask"].bool()
    with torch.no_grad():
        expected = model(**arguments).logits
        for part in (model.encoder, model.decoder, model.decoder.block[0], model.decoder.block[1]):
            with attnzoo.patch(part, "sdpa"):
                got = model(**arguments).logits
            torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-4)


@pytest.fixture
def without_bias_gradient(add_backend):
    """A backend with all gradients except those of biases."""
    return add_backend("without-bias-gradient", bias_grad=False).name


@kinds
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["later layers", "all layers"])
def test_layers_fall_back_together_if_the_shared_bias_trains(kind, train, first, without_bias_gradient):
    def prepare(model):
        model.train(train)

    model, arguments = longt5(kind), inputs(37)
    reference, _ = outcome(model, arguments, None, torch.float64, prepare)
    original, _ = outcome(model, arguments, None, torch.float32, prepare)
    prepare(model)
    backends = without_bias_gradient if first else {"*.block.[1-9].*": without_bias_gradient}
    with attnzoo.patch(model, backends, fallback="native"):
        copied = copy.deepcopy(model)
        patched, _ = outcome(model, arguments)
        copies, _ = outcome(copied, arguments)
    for name, expected in reference.items():
        for got in (patched[name], copies[name]):
            assert_obeys_the_error_rule(name, got, expected, original[name], GRADIENT)


@kinds
def test_layers_are_refused_if_another_layer_trains_their_bias(kind, without_bias_gradient):
    model, later = longt5(kind).train(), {"*.block.1.*": without_bias_gradient}
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.patch(model, later)
    assert {name.split(".")[0] for name in caught.value.refusals} == {"encoder", "decoder"}
    assert {name.rsplit(".", 1)[1] for name in caught.value.refusals}.isdisjoint({"EncDecAttention"})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" not in name)
    with attnzoo.patch(model, later) as handle:
        model(**inputs(37)).logits.sum().backward()
    assert all(site.calls for site in handle.sites)


@kinds
@pytest.mark.parametrize("frozen", ["encoder.block.0", "encoder.block.1", "relative_attention_bias"])
def test_layers_that_fall_back_share_the_bias_with_other_layers(kind, frozen, add_backend):
    """The backend has no gradients. It runs the layers before the first trained weight. The other layers fall back."""

    def prepare(model):
        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (name.startswith("shared") or frozen in name))

    add_backend("without-gradient", grad=False, bias_grad=False)
    model, arguments = longt5(kind, tie_word_embeddings=False), inputs(37)
    reference, _ = outcome(model, arguments, None, torch.float64, prepare)
    original, _ = outcome(model, arguments, None, torch.float32, prepare)
    prepare(model)
    with attnzoo.patch(model, "without-gradient", fallback="native") as handle:
        patched, _ = outcome(model, arguments)
    assert handle.sites
    for name, expected in reference.items():
        assert_obeys_the_error_rule(name, patched[name], expected, original[name], GRADIENT)


@kinds
@backends
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copied"])
def test_bias_is_computed_once_per_forward_and_holds_one_value_per_distance(kind, backend, copied):
    model, arguments = longt5(kind), inputs(100)
    looked_up, passed = [], []
    for name, module in model.named_modules():
        if name.endswith(TABLES):
            module.register_forward_hook(lambda module, args, output: looked_up.append(output.numel()))
        if name.endswith(("SelfAttention", "EncDecAttention")) and "layer" in name:
            module.register_forward_hook(lambda module, args, output: passed.append(output[1]))
    with torch.no_grad(), attnzoo.patch(model, backend):
        (copy.deepcopy(model) if copied else model)(**arguments)
    assert len(looked_up) == (2 if kind == "local" else 3)
    sizes = [value.numel() for value in passed if value is not None]
    assert len(sizes) >= 5
    assert max(looked_up + sizes) <= 4 * (2 * RADIUS + 1 + 2 * 16 + 1)


@kinds
def test_deep_copy_of_a_layer_copies_no_other_layer(kind):
    model, arguments = longt5(kind), inputs(37)
    real = arguments["decoder_attention_mask"].bool()
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        expected = model(**arguments).logits
        for stack in (model.encoder, model.decoder):
            first, others, copied = stack.block[0], stack.block[1:], {}
            stack.block[0] = copy.deepcopy(first, copied)
            assert not any(id(module) in copied for module in others.modules())
            torch.testing.assert_close(model(**arguments).logits[real], expected[real], rtol=1e-5, atol=1e-4)
            attnzoo.unpatch(stack.block[0])
            torch.testing.assert_close(model(**arguments).logits[real], expected[real], rtol=1e-5, atol=1e-4)
