"""An adapter refuses code it was not verified against, and says whose change it is."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox import modeling_gpt_neox

import attnzoo
from attnzoo import registry
from attnzoo.fingerprint import drift, fingerprint


def test_drift_tells_what_is_gone_and_what_is_other():
    where = "transformers.models.gpt_neox.modeling_gpt_neox"
    known = fingerprint(modeling_gpt_neox.GPTNeoXAttention.forward)
    assert drift({f"{where}:GPTNeoXAttention.forward": ("other", known)}) == ()
    (line,) = drift({f"{where}:GPTNeoXAttention.forward": ("0123456789abcdef",)})
    assert line == f"{where}:GPTNeoXAttention.forward: got fingerprint {known}; allowed: 0123456789abcdef"
    (line,) = drift({f"{where}:GPTNeoXAttention.backward_": (known,)})
    assert "AttributeError" in line
    (line,) = drift({"transformers.models.gpt_neoy:X.forward": (known,)})
    assert "ModuleNotFoundError" in line
    (line,) = drift({"builtins:len": (known,)})
    assert "TypeError" in line


# Drift refuses


def tiny(cls=GPTNeoXForCausalLM):
    config = GPTNeoXConfig(
        vocab_size=19, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    return cls(config).eval()


def assert_unpatched(model):
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_changed_forward_is_refused_with_the_versions_known(monkeypatch):
    model, original = tiny(), modeling_gpt_neox.GPTNeoXAttention.forward

    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(modeling_gpt_neox.GPTNeoXAttention, "forward", forward)
    with pytest.raises(attnzoo.DriftError) as caught:
        attnzoo.patch(model, "sdpa")
    message = str(caught.value)
    assert f"installed is {transformers.__version__}" in message
    assert f"verified against transformers {registry.find_adapter('gpt_neox').versions}" in message
    assert "GPTNeoXAttention.forward: got fingerprint" in message
    assert_unpatched(model)
    with attnzoo.patch(model, "native"):  # the model's own code relies on nothing
        model(torch.arange(4)[None])


def test_a_forward_that_is_gone_is_refused(monkeypatch):
    model = tiny()
    monkeypatch.delattr(modeling_gpt_neox.GPTNeoXAttention, "forward")
    with pytest.raises(attnzoo.DriftError, match="GPTNeoXAttention"):
        attnzoo.patch(model, "sdpa")
    assert_unpatched(model)


def test_a_subclass_that_overrides_the_forward_is_refused():
    class Louder(modeling_gpt_neox.GPTNeoXAttention):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return 2 * output, weights

    model = tiny()
    model.gpt_neox.layers[1].attention = Louder(model.config, layer_idx=1)
    with pytest.raises(attnzoo.DriftError, match=r"Louder overrides the forward of .*GPTNeoXAttention"):
        attnzoo.patch(model, "sdpa")
    assert_unpatched(model)


def test_a_subclass_that_keeps_the_forward_is_served():
    class Marked(modeling_gpt_neox.GPTNeoXAttention):
        """Nothing of its own."""

    model = tiny()
    model.gpt_neox.layers[1].attention = Marked(model.config, layer_idx=1)
    with attnzoo.patch(model, "sdpa") as handle, torch.no_grad():
        model(torch.arange(4)[None])
    assert [(site.cls, site.calls) for site in handle.sites] == [("GPTNeoXAttention", 1), ("Marked", 1)]


SEAMS = [
    pytest.param(seam, id=f"{model_type}-{seam.cls.partition(':')[2]}")
    for model_type in registry.model_types()
    for seam in (registry.find_adapter(model_type) or pytest.fail(model_type)).seams
]


@pytest.mark.parametrize("seam", SEAMS)
def test_every_adapter_is_verified_against_the_installed_transformers(seam):
    assert seam.verified, "an adapter says what it relies on"
    assert drift(dict(seam.verified)) == ()


@pytest.mark.parametrize("model_type", registry.model_types())
def test_every_adapter_says_which_versions_it_knows(model_type):
    adapter = registry.find_adapter(model_type)
    assert model_type in adapter.model_types
    assert adapter.versions != "unknown"
