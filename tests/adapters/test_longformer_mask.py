"""Patched LED and Longformer models make a padding mask of one row, with the same values for all layers."""

import copy

import pytest
import torch
from transformers.models.longformer import modeling_longformer

import attnzoo
from attnzoo.originals import slots
from attnzoo.patching.forwards import PatchedForward
from tests.support.models import led, led_inputs, longformer, longformer_inputs

LENGTH = 37
CASES = {
    # builds the model, its inputs, the module that makes the mask, the layers that read the mask
    "led": (led, led_inputs, "led.encoder", "led.encoder.layers"),
    "longformer": (longformer, longformer_inputs, "longformer", "longformer.encoder.layer"),
}
cases = pytest.mark.parametrize(("build", "inputs", "maker", "layers"), CASES.values(), ids=CASES)
sides = pytest.mark.parametrize("side", ["none", "left", "right", "every"])


def run(model, inputs, **more):
    """Return the output of the model and the mask that its first encoder layer gets."""
    layers = next(
        module for name, module in model.named_modules() if name.endswith(("encoder.layers", "encoder.layer"))
    )
    masks = []
    hook = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append((args[1:2] or (kwargs.get("attention_mask"),))[0]), with_kwargs=True
    )
    with torch.no_grad():
        output = model(**inputs, **more)
    hook.remove()
    return output, masks[0]


def is_taken_over(module):
    return isinstance(slots.current(module), PatchedForward)


@cases
@sides
@pytest.mark.parametrize("global_tokens", ["zero", "varying"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_mask_equals_the_original_bit_for_bit(build, inputs, maker, layers, side, global_tokens, dtype):
    model, given = build().to(dtype), inputs(LENGTH, side, global_tokens)
    _, expected = run(model, given)
    with attnzoo.patch(model, "eager"):
        _, mask = run(model, given)
    assert mask.dtype == dtype and torch.equal(mask, expected)
    rows = mask.untyped_storage().nbytes() // mask.element_size() // mask.numel()
    assert rows == 1 < expected.untyped_storage().nbytes() // mask.element_size() // mask.numel()


@cases
@sides
@pytest.mark.parametrize("which", ["all", "first"])
def test_one_row_mask_changes_no_output(build, inputs, maker, layers, side, which):
    """A patch of only the layers does not change the mask. The same kernels run on both masks."""
    model, given = build(), inputs(LENGTH, side)
    part = model.get_submodule(layers)[0] if which == "first" else model.get_submodule(layers)
    with attnzoo.patch(part, "sdpa"):
        assert not is_taken_over(model.get_submodule(maker))
        expected, _ = run(model, given)
    glob = f"{layers}.0.*" if which == "first" else f"{layers}.*"
    with attnzoo.patch(model, {glob: "sdpa", "*": "native"}):
        assert is_taken_over(model.get_submodule(maker))
        output, _ = run(model, given)
    assert torch.equal(output[0], expected[0])


@cases
def test_layers_that_fall_back_equal_the_original(build, inputs, maker, layers):
    model, given = build(), inputs(LENGTH, "left")
    expected, _ = run(model, given, output_attentions=True)
    with attnzoo.patch(model, "sdpa", fallback="native") as handle:
        output, _ = run(model, given, output_attentions=True)
    assert all(site.fallbacks and not site.calls for site in handle.sites)
    assert torch.equal(output[0], expected[0])
    name = "encoder_attentions" if "encoder_attentions" in expected else "attentions"
    assert all(map(torch.equal, output[name], expected[name]))


@cases
def test_native_patch_leaves_the_mask_alone(build, inputs, maker, layers):
    model = build()
    with attnzoo.patch(model, "native"):
        assert not is_taken_over(model.get_submodule(maker))


@cases
def test_undo_is_exact(build, inputs, maker, layers):
    model, given = build(), inputs(LENGTH, "every")
    module = model.get_submodule(maker)
    before, (expected, mask) = dict(vars(module)), run(model, given)
    outer = attnzoo.patch(model, "eager")
    inner = attnzoo.patch(model, "sdpa")
    twin = copy.deepcopy(model)
    inner.remove()
    assert is_taken_over(module)
    outer.remove()
    attnzoo.unpatch(twin)
    attnzoo.unpatch(twin)
    assert vars(module).keys() == before.keys() and not is_taken_over(twin.get_submodule(maker))
    for restored in (model, twin):
        output, again = run(restored, given)
        assert torch.equal(output[0], expected[0]) and torch.equal(again, mask)


@cases
def test_replaced_forward_is_left_alone(build, inputs, maker, layers):
    model, given = build(), inputs(LENGTH, "left")
    module, calls = model.get_submodule(maker), []
    original = module.forward

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    module.forward = forward
    with attnzoo.patch(model, "eager") as handle:
        run(model, given)
    assert calls and all(site.calls for site in handle.sites) and module.forward is forward


@cases
def test_subclass_that_overrides_the_forward_is_left_alone(build, inputs, maker, layers):
    model, given = build(), inputs(LENGTH, "left")
    module = model.get_submodule(maker)

    class Longer(type(module)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    module.__class__ = Longer
    with attnzoo.patch(model, "eager") as handle:
        run(model, given)
        assert not is_taken_over(module)
    assert all(site.calls for site in handle.sites)


def test_replaced_mask_function_of_longformer_is_refused(monkeypatch):
    """The one-row mask depends on how ``create_bidirectional_mask`` reads its arguments."""

    def create_bidirectional_mask(**kwargs):
        return original(**kwargs)

    original = modeling_longformer.create_bidirectional_mask
    monkeypatch.setattr(modeling_longformer, "create_bidirectional_mask", create_bidirectional_mask)
    with pytest.raises(attnzoo.DriftError, match=r"create_bidirectional_mask: replaced at run time"):
        attnzoo.patch(longformer(), "eager")


@cases
def test_unpatched_model_keeps_its_mask(build, inputs, maker, layers):
    model, other, given = build(), build(), inputs(LENGTH, "left")
    expected, mask = run(other, given)
    with attnzoo.patch(model, "eager"):
        run(model, given)
        output, again = run(other, given)
    assert torch.equal(output[0], expected[0]) and torch.equal(again, mask)
    assert again.untyped_storage().nbytes() == mask.untyped_storage().nbytes()
