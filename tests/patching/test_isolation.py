"""A patch changes one model, and no other model, config, weights or part of transformers."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import attnzoo
from tests.support.subject import build_subject


@pytest.mark.parametrize("backend", ["eager", "sdpa", "native", "auto"])
def test_a_patch_does_not_change_a_model_with_the_same_config_object(subject, backend, snapshot):
    other = build_subject(subject.kind, config=subject.model.config, seed=2)
    assert other.model.config is subject.model.config
    before, native = snapshot(other), subject.logits()
    handle = attnzoo.patch(subject.model, backend)
    before.assert_unchanged()
    subject.logits()
    before.assert_unchanged()
    counted = [site.calls for site in handle.sites]
    other.logits()
    assert [site.calls for site in handle.sites] == counted
    handle.remove()
    before.assert_unchanged()
    assert torch.equal(subject.logits(), native)


def test_two_models_with_one_config_run_different_backends(subject):
    other = build_subject(subject.kind, config=subject.model.config, seed=2)
    natives = subject.logits(), other.logits()
    with attnzoo.patch(subject.model, "eager") as first, attnzoo.patch(other.model, "sdpa") as second:
        assert subject.close(subject.logits(), natives[0])
        assert {site.kernel for site in second.sites} == {None}
        assert other.close(other.logits(), natives[1])
        assert {site.kernel for site in first.sites} == {"eager"}
        assert all("eager" not in site.kernels for site in second.sites)
        assert sum(site.calls for site in first.sites) == sum(site.calls for site in second.sites) > 0
    assert torch.equal(subject.logits(), natives[0])
    assert torch.equal(other.logits(), natives[1])


@pytest.mark.parametrize("backend", ["eager", "sdpa", "native", "auto"])
def test_remove_restores_the_model(subject, backend, snapshot):
    before = snapshot(subject)
    handle = attnzoo.patch(subject.model, backend)
    for number, name in enumerate(subject.sites):
        assert "forward" in vars(subject.module(number)), name
    subject.logits()
    handle.remove()
    before.assert_unchanged()
    for name, module in subject.model.named_modules():
        assert "forward" not in vars(module), name
        assert module.forward.__func__ is type(module).forward, name
    assert handle.sites[0].calls, "what ran can still be read after the removal"


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_patch_does_not_change_types_weights_and_config(subject, backend, snapshot):
    before = snapshot(subject)
    with attnzoo.patch(subject.model, backend):
        subject.logits()
        before.assert_unchanged(patched=True)
        assert not any(module._forward_hooks for module in subject.model.modules())
    before.assert_unchanged()


def test_save_pretrained_of_a_patched_model_saves_the_original(subject, tmp_path, snapshot):
    subject.model.save_pretrained(tmp_path / "plain")  # writes dtype and architectures into the config
    before = snapshot(subject)
    with attnzoo.patch(subject.model, "sdpa") as handle:
        subject.logits()
        subject.model.save_pretrained(tmp_path / "patched")
        assert handle.active
    before.assert_unchanged()

    loaded = type(subject.model).from_pretrained(tmp_path / "patched").eval()
    state = loaded.state_dict()
    assert list(state) == list(before.state)
    assert all(torch.equal(tensor, before.state[name]) for name, tensor in state.items())
    assert torch.equal(subject.logits(loaded), before.logits)
    with pytest.raises(attnzoo.PatchError, match="not patched"):
        attnzoo.unpatch(loaded)
    assert (tmp_path / "plain/config.json").read_text() == (tmp_path / "patched/config.json").read_text()


def test_weights_can_be_loaded_into_a_patched_model(subject):
    other = build_subject(subject.kind, seed=2)
    with attnzoo.patch(subject.model, "sdpa"):
        subject.model.load_state_dict(other.model.state_dict())
        assert subject.close(subject.logits(), other.logits())
    assert torch.equal(subject.logits(), other.logits())


def test_importing_and_patching_do_not_change_transformers():
    """The test runs in a new process that has not imported attnzoo yet."""
    script = """
    import sys
    import torch
    import transformers
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.gpt_neox import modeling_gpt_neox
    from transformers.models.led import modeling_led

    def globals_of_transformers():
        return (
            {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS},
            {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ALL_MASK_ATTENTION_FUNCTIONS},
            dict(vars(modeling_gpt_neox)),
            dict(vars(modeling_led)),
            [dict(vars(cls)) for module in (modeling_gpt_neox, modeling_led) for cls in vars(module).values()
             if isinstance(cls, type) and cls.__module__ == module.__name__],
        )

    before = globals_of_transformers()
    assert "sdpa" in before[0] and "sdpa" in before[1] and len(before[4]) > 10
    assert "attnzoo" not in sys.modules
    import attnzoo
    assert globals_of_transformers() == before, "import"
    config = transformers.GPTNeoXConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    neox = transformers.GPTNeoXForCausalLM(config)
    led = transformers.LEDModel(transformers.LEDConfig(
        vocab_size=9, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, attention_window=4,
    ))
    tokens = torch.arange(16).reshape(2, 8) % 9
    for model in (neox, led):
        model(tokens)  # what transformers itself writes down, it has written now
    before = globals_of_transformers()
    for model in (neox, led):
        with attnzoo.patch(model, "sdpa") as handle:
            assert globals_of_transformers() == before, "patch"
            model(tokens)
            assert all(site.calls for site in handle.sites)
            assert globals_of_transformers() == before, "forward"
        assert globals_of_transformers() == before, "remove"
    print("untouched")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "untouched"
