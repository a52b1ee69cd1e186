"""The mask of one row that patched LED and Longformer models make: the same mask, for patched layers and for others."""

import copy

import pytest
import torch

import attnzoo
from attnzoo.originals import slots
from attnzoo.patching.forwards import PatchedForward
from tests.support.models import led, led_inputs, longformer, longformer_inputs

LENGTH = 37
CASES = {
    # model, inputs, the module that makes the mask, its layers
    "led": (led, led_inputs, "led.encoder", "led.encoder.layers"),
    "longformer": (longformer, longformer_inputs, "longformer", "longformer.encoder.layer"),
}
cases = pytest.mark.parametrize(("build", "inputs", "maker", "layers"), CASES.values(), ids=CASES)
sides = pytest.mark.parametrize("side", ["none", "left", "right", "every"])


def run(model, inputs, **more):
    """Output of the model, and the mask that its first encoder layer gets."""
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


def takes_over(module):
    """Whether the module's forward is a patch."""
    return isinstance(slots.current(module), PatchedForward)


@cases
@sides
@pytest.mark.parametrize("globals_", ["zero", "varying"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_mask_is_that_of_the_original_bit_for_bit(build, inputs, maker, layers, side, globals_, dtype):
    model, given = build().to(dtype), inputs(LENGTH, side, globals_)
    _, expected = run(model, given)
    with attnzoo.patch(model, "eager"):
        _, mask = run(model, given)
    assert mask.dtype == dtype and torch.equal(mask, expected)
    rows = mask.untyped_storage().nbytes() // mask.element_size() // mask.numel()
    assert rows == 1 < expected.untyped_storage().nbytes() // mask.element_size() // mask.numel()


@cases
@sides
@pytest.mark.parametrize("which", ["all", "first"])
def test_outputs_are_those_of_patched_layers_alone(build, inputs, maker, layers, side, which):
    """A patch of the layers does not reach the module that makes the mask: the same kernels run on the original's."""
    model, given = build(), inputs(LENGTH, side)
    part = model.get_submodule(layers)[0] if which == "first" else model.get_submodule(layers)
    with attnzoo.patch(part, "sdpa"):
        assert not takes_over(model.get_submodule(maker))
        expected, _ = run(model, given)
    glob = f"{layers}.0.*" if which == "first" else f"{layers}.*"
    with attnzoo.patch(model, {glob: "sdpa", "*": "native"}):
        assert takes_over(model.get_submodule(maker))
        output, _ = run(model, given)
    assert torch.equal(output[0], expected[0])


@cases
def test_layers_that_fall_back_give_what_the_original_gives(build, inputs, maker, layers):
    model, given = build(), inputs(LENGTH, "left")
    expected, _ = run(model, given, output_attentions=True)
    with attnzoo.patch(model, "sdpa", fallback="native") as handle:
        output, _ = run(model, given, output_attentions=True)
    assert all(site.fallbacks and not site.calls for site in handle.sites)
    assert torch.equal(output[0], expected[0])
    name = "encoder_attentions" if "encoder_attentions" in expected else "attentions"
    assert all(map(torch.equal, output[name], expected[name]))


@cases
def test_the_models_own_code_makes_its_own_mask(build, inputs, maker, layers):
    model = build()
    with attnzoo.patch(model, "native"):
        assert not takes_over(model.get_submodule(maker))


@cases
def test_undo_is_exact(build, inputs, maker, layers):
    model, given = build(), inputs(LENGTH, "every")
    module = model.get_submodule(maker)
    before, (expected, mask) = dict(vars(module)), run(model, given)
    outer = attnzoo.patch(model, "eager")
    inner = attnzoo.patch(model, "sdpa")
    twin = copy.deepcopy(model)
    inner.remove()
    assert takes_over(module)
    outer.remove()
    attnzoo.unpatch(twin)
    attnzoo.unpatch(twin)
    assert vars(module).keys() == before.keys() and not takes_over(twin.get_submodule(maker))
    for one in (model, twin):
        output, again = run(one, given)
        assert torch.equal(output[0], expected[0]) and torch.equal(again, mask)


@cases
def test_a_forward_of_someone_else_is_left_alone(build, inputs, maker, layers):
    model, given = build(), inputs(LENGTH, "left")
    module, calls = model.get_submodule(maker), []
    own = module.forward

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return own(*args, **kwargs)

    module.forward = forward
    with attnzoo.patch(model, "eager") as handle:
        run(model, given)
    assert calls and all(site.calls for site in handle.sites) and module.forward is forward


@cases
def test_a_subclass_with_a_forward_of_its_own_is_left_alone(build, inputs, maker, layers):
    model, given = build(), inputs(LENGTH, "left")
    module = model.get_submodule(maker)

    class Longer(type(module)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    module.__class__ = Longer
    with attnzoo.patch(model, "eager") as handle:
        run(model, given)
        assert not takes_over(module)
    assert all(site.calls for site in handle.sites)


@cases
def test_an_unpatched_model_beside_a_patched_one_is_left_alone(build, inputs, maker, layers):
    model, other, given = build(), build(), inputs(LENGTH, "left")
    expected, mask = run(other, given)
    with attnzoo.patch(model, "eager"):
        run(model, given)
        output, again = run(other, given)
    assert torch.equal(output[0], expected[0]) and torch.equal(again, mask)
    assert again.untyped_storage().nbytes() == mask.untyped_storage().nbytes()
