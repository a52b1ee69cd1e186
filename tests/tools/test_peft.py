"""PEFT on patched models: LoRA, prefix tuning, saved modules and merged weights. The adapter comes first or last."""

from __future__ import annotations

import pytest
import torch

import attnzoo
from tests.support.models import gpt_neox, ids, led, llama, longt5, reformer
from tests.support.programs import assert_runs_as_unpatched, updates_of, weights_of

peft = pytest.importorskip("peft", reason="needs PEFT: pip install attnzoo[tools]")
STEPS, LENGTH = 3, 24
# Kernels of each site in one training step, by the class of the site.
TARGETS = {
    gpt_neox: ["query_key_value"],
    llama: ["q_proj", "v_proj"],
    led: ["query", "value_global", "q_proj"],
    longt5: ["q", "v"],
    reformer: ["query_key", "value"],
}


def adapted(model, build, **options):
    """The model with LoRA layers. Their second matrix is not zero, so that the adapter changes the outputs."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS[build], init_lora_weights=False, lora_dropout=0.0, **options
    )
    torch.manual_seed(0)
    dtype = next(model.parameters()).dtype
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)


def inputs_of(build, step=0):
    tokens = ids(2, LENGTH, seed=step)
    labels = ids(2, 6, seed=step + 9) if build in (led, longt5) else tokens
    return dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels)


def train(model, build):
    """Train what is not frozen. Return the losses and the changes of all weights."""
    before = weights_of(model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    losses = []
    for step in range(STEPS):
        loss = model(**inputs_of(build, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "updates of weights": updates_of(model, before)}


@pytest.mark.parametrize("first", ["patch", "adapter"])
@pytest.mark.parametrize("build", TARGETS)
def test_lora_trains_and_merges_as_without_a_patch(build, first):
    def program(model, patch):
        if first == "patch":
            patch(model)
        model = adapted(model.train(), build)
        model.enable_input_require_grads()  # Reformer's reversible layers give gradients only if their input has
        if first == "adapter":
            patch(model)
        results = train(model, build)
        frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
        assert frozen and all("lora_" not in name for name in frozen)
        merged = model.merge_and_unload().eval()
        with torch.no_grad():
            logits = merged(**inputs_of(build)).logits
        return {**results, "logits of the merged model": logits}

    reverses = build is reformer  # its backward computes the forward again
    dtype = torch.float64 if reverses else torch.float32
    assert_runs_as_unpatched(build, program, calls=(2 if reverses else 1) * STEPS + 1, dtype=dtype)


def test_saved_modules_are_trained_as_without_a_patch():
    """``modules_to_save`` copies a module and trains the copy: here, whole attention modules."""

    def program(model, patch):
        patch(model)
        config = peft.LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=["self_attn"])
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        results = train(model, llama)
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert any("self_attn.modules_to_save" in name for name in trained)
        return results

    assert_runs_as_unpatched(llama, program, calls=STEPS)


@pytest.mark.parametrize("build", [gpt_neox, llama])
def test_prefix_tuning_trains_and_generates_as_without_a_patch(build):
    """The prefix is a filled cache: every query sees the keys of the prefix."""

    def program(model, patch):
        patch(model)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        model = model.to(next(model.base_model.parameters()).dtype)
        results = train(model, build)
        tokens = model.eval().generate(input_ids=ids(2, 7), max_new_tokens=4, do_sample=False, use_cache=True)
        return {**results, "tokens": tokens}

    assert_runs_as_unpatched(build, program, calls=STEPS + 4)


def test_an_adapter_is_saved_and_loaded_into_a_patched_model(tmp_path):
    expected = adapted(llama(), llama)
    with torch.no_grad():
        logits = expected(input_ids=ids(2, LENGTH)).logits
    with attnzoo.patch(expected, "sdpa"):
        expected.save_pretrained(tmp_path)
    model = llama()
    handle = attnzoo.patch(model, "sdpa")
    loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    with torch.no_grad():
        got = loaded(input_ids=ids(2, LENGTH)).logits
    assert {site.calls for site in handle.sites} == {1}
    torch.testing.assert_close(got, logits)
    handle.remove()
    assert not attnzoo.is_patched(loaded)
