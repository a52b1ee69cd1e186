"""A patch reaches the modules of the classes that an adapter knows, whatever the model's configuration is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

import attnzoo
from attnzoo import DriftError, PatchError
from attnzoo.registry import registry
from tests.support.models import causal_inputs, gpt_neox, led, led_inputs, spread


def foreign_config():
    """A RoBERTa's configuration, with the fields a Longformer attention reads."""
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = RobertaConfig(**sizes, max_position_embeddings=80, pad_token_id=1, attn_implementation="eager")
    config.attention_window, config.attention_probs_dropout_prob = [8, 4], 0.0
    return config


class Converted(nn.Module):
    """Replacement for the attention of a RoBERTa layer. It calls Longformer's attention with suitable arguments."""

    def __init__(self, config, layer, cls=LongformerSelfAttention):
        super().__init__()
        self.longformer = cls(config, layer_id=layer)

    def forward(self, hidden_states, *args, **kwargs):
        mask = torch.zeros(hidden_states.shape[:2])
        mask[:, 0], mask[0, -3:] = 1.0, -1e4
        given = dict(is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=True)
        return self.longformer(hidden_states, attention_mask=mask, **given)[0], None


def converted_roberta(cls=LongformerSelfAttention):
    config = foreign_config()
    model = RobertaModel(config, add_pooling_layer=False)
    for number, layer in enumerate(model.encoder.layer):
        layer.attention.self = Converted(config, number, cls)
    return spread(model)


def test_patch_reaches_an_attention_in_a_model_of_another_family():
    model, tokens = converted_roberta(), torch.arange(32).view(2, 16) + 3
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        with attnzoo.patch(model, "sdpa") as handle:
            output = model(tokens).last_hidden_state
        assert [(site.cls, site.calls) for site in handle.sites] == [("LongformerSelfAttention", 2)] * 2
        torch.testing.assert_close(output, expected)
        assert torch.equal(model(tokens).last_hidden_state, expected)
    assert [verdict.runs for verdict in attnzoo.explain(model, "sdpa")] == [True, True]


@pytest.mark.parametrize("bare", [False, True], ids=["in a module", "the attention itself"])
def test_patch_reaches_an_attention_without_a_model_type(bare):
    module, states = spread(Converted(foreign_config(), 0)), torch.randn(2, 16, 32)
    module.longformer.config = SimpleNamespace(attention_window=[8, 4])
    expected = module(states)[0]
    with attnzoo.patch(module.longformer if bare else module, "eager") as handle:
        torch.testing.assert_close(module(states)[0], expected)
    assert [site.calls for site in handle.sites] == [2]


def test_patch_reaches_two_families_in_one_model():
    model = nn.ModuleDict({"one": gpt_neox(), "other": led()})
    inputs = {"one": causal_inputs(16, "left"), "other": led_inputs(24, "right")}
    with torch.no_grad():
        expected = {name: part(**inputs[name]).logits for name, part in model.items()}
        with attnzoo.patch(model, {"one.*": "eager", "other.*": "sdpa"}) as handle:
            for name, part in model.items():
                real = inputs[name].get("decoder_attention_mask", inputs[name]["attention_mask"]).bool()
                output = part(**inputs[name]).logits
                torch.testing.assert_close(output[real], expected[name][real], atol=1e-3, rtol=1e-3)
    assert [site.backend for site in handle.sites] == ["eager"] * 2 + ["sdpa"] * 6
    assert all(site.calls for site in handle.sites)


class HandsOn(LongformerSelfAttention):
    """A subclass whose forward calls the forward of the base class, as in published conversions."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_subclass_that_overrides_forward_is_named():
    model = converted_roberta(HandsOn)
    with pytest.raises(DriftError, match=r"test_sites:HandsOn\.forward: overrides LongformerSelfAttention\.forward"):
        attnzoo.patch(model, "sdpa")


def test_the_adapter_of_the_nearest_class_wins(isolated_registry):
    """The adapter of a subclass wins over that of its base class, whatever the model type is."""
    point = next(point for point in registry.find_adapter("longformer").points if point.attends)

    class HandsOnPoint(type(point)):
        cls, verified = f"{__name__}:HandsOn", {}

        def describe(self, module):
            return "by hand"

    own = HandsOnPoint()
    attnzoo.register_adapter(attnzoo.Adapter(model_types=("handed_on",), points=(own,)))
    with attnzoo.patch(converted_roberta(HandsOn), "sdpa") as handle:
        assert {site.pattern for site in handle.sites} == {"by hand"}
    with attnzoo.patch(converted_roberta(), "sdpa") as handle:
        assert {site.pattern for site in handle.sites} == {"window 8 + global keys", "window 4 + global keys"}


@pytest.mark.parametrize("type_", ["roberta", "mine"])
def test_the_adapter_of_the_model_type_wins_among_adapters_for_one_class(isolated_registry, type_):
    point = next(point for point in registry.find_adapter("longformer").points if point.attends)

    class ByHand(type(point)):
        def describe(self, module):
            return "by hand"

    own = ByHand()
    attnzoo.register_adapter(attnzoo.Adapter(model_types=("mine",), points=(own,)))
    model = converted_roberta()
    model.config.model_type = type_
    with attnzoo.patch(model, "sdpa") as handle:
        assert ({site.pattern for site in handle.sites} == {"by hand"}) == (type_ == "mine")


def test_a_copy_of_a_known_class_is_named():
    """The code of a checkpoint may have classes of the same names in another module."""

    class Parent(nn.Module):
        pass

    copied = type("LongformerSelfAttention", (Parent,), {"__module__": "their.modeling"})
    with pytest.raises(PatchError) as caught:
        attnzoo.patch(nn.Sequential(copied()), "sdpa")
    assert "their.modeling:LongformerSelfAttention is another class than transformers.models" in str(caught.value)
    assert "AttentionInterface, attention modules of the model types big_bird, bigbird_pegasus, " in str(caught.value)
    assert len(str(caught.value)) < 500
