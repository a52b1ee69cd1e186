"""Longformer's and LED's global tokens: their projections are absorbed into the few queries where nobody can tell."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.backends.eager import EagerBackend

from ..models.zoo import led, led_inputs


def calls_of(linear):
    """Counts calls of a linear layer without a hook on it: hooks are what is to be respected."""
    seen = []
    original = nn.functional.linear

    def counting(input, weight, bias=None):
        seen.extend([1] if weight is linear.weight else [])
        return original(input, weight, bias)

    return seen, counting


@pytest.fixture
def model():
    return led()


def key_global(model):
    return model.led.encoder.layers[0].self_attn.longformer_self_attn.key_global


def projected(model, monkeypatch, grad=False, globals_="one", **kwargs):
    """Whether the patched model projected all keys of the first layer for the global tokens."""
    seen, counting = calls_of(key_global(model))
    monkeypatch.setattr(nn.functional, "linear", counting)
    with attnzoo.patch(model, kwargs.pop("backend", "sdpa")), torch.set_grad_enabled(grad):
        model(**led_inputs(37, "left", globals_), **kwargs)
    return bool(seen)


def test_few_global_tokens_absorb_the_projection(model, monkeypatch):
    assert not projected(model, monkeypatch)


def test_many_global_tokens_do_not(model, monkeypatch):
    assert projected(model, monkeypatch, globals_="all")


def test_with_gradients_the_projection_runs(model, monkeypatch):
    assert projected(model, monkeypatch, grad=True)


def test_in_training_the_projection_runs(model, monkeypatch):
    assert projected(model.train(), monkeypatch)


def test_for_probabilities_the_projection_runs(model, monkeypatch):
    assert projected(model, monkeypatch, backend="eager", output_attentions=True)


def test_a_hook_on_all_modules_sees_the_projection(model):
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with attnzoo.patch(model, "sdpa"), torch.no_grad():
            model(**led_inputs(37, "left", "one"))
    finally:
        hook.remove()
    assert key_global(model) in seen


def test_a_hook_on_the_projection_is_called(model):
    seen = []
    key_global(model).register_forward_hook(lambda *_: seen.append(1))
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        model(**led_inputs(37, "left", "one"))
    assert seen == [1]


def test_a_projection_of_another_type_is_called(model):
    class Adapted(nn.Linear):
        calls = 0

        def forward(self, states):
            Adapted.calls += 1
            return 2 * super().forward(states)

    attention = model.led.encoder.layers[0].self_attn.longformer_self_attn
    adapted = Adapted(attention.embed_dim, attention.embed_dim)
    adapted.load_state_dict(attention.key_global.state_dict())
    attention.key_global = adapted
    report = attnzoo.verify(model, led_inputs(37, "left", "one"), "sdpa", gradients=False)
    assert report.ok, str(report)
    assert Adapted.calls


def test_a_backend_that_does_not_take_heads_as_wide_as_the_states_gets_the_projection(model, monkeypatch):
    @dataclass(frozen=True)
    class Narrow(EagerBackend):
        def refusals(self, request):
            wide = request.head_dim > 16
            return (attnzoo.Refusal("head_dim", str(request.head_dim), "at most 16"),) if wide else ()

    Narrow.name = "narrow"
    attnzoo.register_backend(Narrow)
    try:
        assert projected(model, monkeypatch, backend="narrow")
        report = attnzoo.verify(model, led_inputs(37, "left", "one"), "narrow", gradients=False)
        assert report.ok, str(report)
    finally:
        attnzoo.unregister_backend("narrow")


def test_auto_absorbs_where_any_backend_takes_it(model, monkeypatch):
    assert not projected(model, monkeypatch, backend="auto")
