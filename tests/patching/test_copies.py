"""Copies of patched modules compute with their own weights, are counted, and can be unpatched.

Deep copies of whole models are tested in ``test_stacking.py``.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import attnzoo
from tests.support.compare import is_close
from tests.support.models import FAMILIES, gpt_bigcode
from tests.support.subject import removals


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def replica(model, factor=1.5):
    """What ``torch.nn.parallel.replicate`` makes of a model, on one device, with weights times a factor."""
    modules = list(model.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        twin = copies[id(module)]
        twin._former_parameters = {}
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else copies[id(child)]
        for name, parameter in module._parameters.items():
            twin._parameters[name] = None
            if parameter is not None:
                del twin._parameters[name]
                setattr(twin, name, parameter * factor)
                twin._former_parameters[name] = getattr(twin, name)
    return copies[id(model)]


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("backend", ["sdpa", "eager", "native", "auto"])
def test_replicas_compute_with_their_own_weights_and_are_counted(family, backend):
    model, inputs = family.build(), family.inputs(21, "none")
    model = model.double() if family.coarse else model  # its masks leave float32 little of a score
    expected = logits(replica(model), inputs)
    with attnzoo.patch(model, backend) as handle:
        assert is_close(logits(replica(model), inputs), expected)
        assert all(site.calls for site in handle.sites)


def test_gradients_of_replicas_reach_the_models_parameters(neox):
    """As in DataParallel, the weights of the replicas are computed from the weights of the model."""
    model, gradients = neox.model, []
    for patched in (False, True):
        model.zero_grad()
        if patched:
            attnzoo.patch(model, "sdpa")
        replica(model)(**neox.inputs).logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for got, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("capability", "double"), [(dict(dtypes=frozenset({torch.float32})), True), (dict(grad=False), False)]
)
def test_the_requests_of_a_replica_are_checked_before_its_forward(led, add_backend, capability, double):
    """A replica lists no parameters. LED's forward cannot fall back midway, so the check must run before it starts."""
    add_backend("narrow", **capability)
    model = led.model.double() if double else led.model
    handle = attnzoo.patch(model, "narrow", fallback="native")
    replica(model)(**led.inputs)
    assert all(site.fallbacks == 1 and not site.calls for site in handle.sites)


def shallow(module, name):
    """A shallow copy of a module in which one layer is a copy with zero weights."""
    twin, layer = copy.copy(module), copy.deepcopy(getattr(module, name))
    twin._modules = {**module._modules, name: layer}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return twin


def call(module, model):
    states = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        rotary = model.gpt_neox.rotary_emb(states, torch.arange(5)[None])
        return module(states, None, position_embeddings=rotary)[0]


def test_a_shallow_copy_computes_with_its_own_layers_and_is_counted(neox):
    with attnzoo.patch(neox.model, "sdpa") as handle:
        twin = shallow(neox.module(), "dense")
        assert call(twin, neox.model).abs().max() == 0.0
        assert handle.sites[0].calls == 1
        assert call(neox.module(), neox.model).abs().max() > 0.0, "the original computes with its own weights"


def test_a_shallow_copy_is_unpatched_separately(neox, snapshot):
    before = snapshot(neox)
    handle = attnzoo.patch(neox.model, "sdpa")
    twin = shallow(neox.module(), "dense")
    attnzoo.unpatch(twin)
    assert "forward" not in vars(twin) and handle.active
    assert call(twin, neox.model).abs().max() == 0.0
    assert handle.sites[0].calls == 0
    call(neox.module(), neox.model)
    assert handle.sites[0].calls == 1
    handle.remove()
    before.assert_unchanged()


def test_a_call_of_a_shallow_copy_raises_after_its_original_is_unpatched(neox):
    handle = attnzoo.patch(neox.model, "sdpa")
    twin = shallow(neox.module(), "dense")
    handle.remove()
    with pytest.raises(attnzoo.PatchError, match=rf"{neox.sites[0]}: got a call of a shallow copy .*attnzoo\.unpatch"):
        call(twin, neox.model)
    attnzoo.unpatch(twin)
    assert call(twin, neox.model).abs().max() == 0.0


class Swapped(nn.Module):
    """Holds a module and a deep copy that runs in its place, as PEFT's ``modules_to_save`` does."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})

    def forward(self, *args, **kwargs):
        return self.modules_to_save["default"](*args, **kwargs)


@removals
def test_deep_copies_inside_the_model_are_counted_and_unpatched_with_it(subject, remove):
    native = subject.logits()
    handle = attnzoo.patch(subject.model, "sdpa")
    module, name = subject.module(), subject.sites[0]
    parent, _, attribute = name.rpartition(".")
    wrapper = Swapped(module)
    setattr(subject.model.get_submodule(parent), attribute, wrapper)
    assert subject.close(subject.logits(), native)
    assert handle.sites[0].calls == (2 if subject.kind == "led" else 1)
    remove(handle, subject.model)
    assert all("forward" not in vars(module) for module in subject.model.modules())
    assert torch.equal(subject.logits(), native)


def test_a_patched_top_module_runs_after_accelerate_unwraps_it(fresh_accelerate):
    """accelerate binds the stored forward to the model, as if the forward were a method of the class."""
    accelerate = fresh_accelerate
    model = gpt_bigcode("GPTBigCodeModel", multi_query=False, add_cross_attention=True)
    width = model.config.n_embd
    inputs = dict(
        input_ids=torch.arange(5)[None] + 3,
        encoder_hidden_states=torch.randn(1, 7, width),
        encoder_attention_mask=torch.ones(1, 7, dtype=torch.long),
    )
    with torch.no_grad():
        handle = attnzoo.patch(model, "sdpa")
        expected = model(**inputs)[0]
        prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        prepared(**inputs)
        unwrapped = accelerate.Accelerator(cpu=True).unwrap_model(prepared, keep_fp32_wrapper=False)
        before = [site.calls for site in handle.sites]
        assert torch.equal(unwrapped(**inputs)[0], expected)
        assert all(site.calls > count for site, count in zip(handle.sites, before, strict=True))
    handle.remove()
    assert not attnzoo.is_patched(model)


def test_a_patched_model_is_freed_with_its_last_reference(family):
    gc.collect()
    gc.disable()  # the cycle collector would free what a cycle keeps
    try:
        for patched in (False, True):
            model = family.build()
            weights = [weakref.ref(parameter) for parameter in model.parameters()]
            if patched:
                attnzoo.patch(model, "sdpa")
            logits(model, family.inputs(21, "left"))
            del model
            assert not any(weight() is not None for weight in weights), "patched" if patched else "the original itself"
    finally:
        gc.enable()


def test_a_handle_does_not_keep_a_model_alive(neox):
    handle = attnzoo.patch(neox.model, "sdpa")
    alive = weakref.ref(neox.model)
    neox.model = None
    gc.collect()
    assert alive() is None and not handle.active
    handle.remove()
