"""The ways of ``generate`` beyond beam search on patched models: assistants, prompts in chunks, continuous batching."""

from __future__ import annotations

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import attnzoo
from tests.support.models import gpt_bigcode, gpt_neox, ids, llama

BUILDS = [gpt_neox, gpt_bigcode, llama]
NEW = dict(max_new_tokens=10, do_sample=False)


def small(build):
    """An assistant: the model with one layer. Some of its tokens are right, and others are not."""
    name = "n_layer" if build is gpt_bigcode else "num_hidden_layers"
    return build(**{name: 1})


@pytest.mark.parametrize("patched", ["model", "assistant", "both"])
@pytest.mark.parametrize("build", BUILDS)
def test_assisted_generation_gives_the_tokens_of_the_model(build, patched):
    model, assistant, prompt = build(), small(build), ids(1, 9)
    expected = model.generate(prompt, **NEW)
    chosen = [one for one, name in ((model, "model"), (assistant, "assistant")) if patched in (name, "both")]
    handles = [attnzoo.patch(one, "sdpa") for one in chosen]
    got = model.generate(prompt, assistant_model=assistant, **NEW)
    assert torch.equal(got, expected)
    assert all(site.calls for handle in handles for site in handle.sites)
    if patched != "assistant":
        assert handles[0].sites[0].calls <= NEW["max_new_tokens"], "the model reads several tokens at once"


@pytest.mark.parametrize("build", BUILDS)
def test_prompt_lookup_gives_the_tokens_of_the_model(build):
    model, prompt = build(), ids(1, 6).repeat(1, 3)
    expected = model.generate(prompt, **NEW)
    with attnzoo.patch(model, "sdpa") as handle:
        got = model.generate(prompt, prompt_lookup_num_tokens=3, **NEW)
    assert torch.equal(got, expected) and all(site.calls for site in handle.sites)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_prompt_in_chunks_gives_the_tokens_of_the_whole_prompt(build, static):
    model, prompt = build(), ids(2, 25)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    options = dict(attention_mask=mask, **NEW, **(dict(cache_implementation="static") if static else {}))
    expected = model.generate(prompt, **options)
    with attnzoo.patch(model, "sdpa") as handle:
        got = model.generate(prompt, prefill_chunk_size=8, **options)
    assert torch.equal(got, expected)
    chunks, steps = 4, NEW["max_new_tokens"] - 1
    assert {site.calls for site in handle.sites} == {chunks + steps}


@pytest.mark.parametrize("build", [gpt_bigcode, llama])
def test_continuous_batching_runs_on_the_models_code_or_is_refused(build):
    """More cases are in ``tests/patching/test_continuous_batching.py``."""
    model, prompts = build(), [[5, 6, 7, 8], [9, 10]]
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=1)
    batching = ContinuousBatchingConfig(num_blocks=8, block_size=32, max_batch_tokens=32)
    options = dict(generation_config=settings, continuous_batching_config=batching, warmup=False)
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    with attnzoo.patch(model, "sdpa"), pytest.raises(attnzoo.PatchError, match=r"init_continuous_batching.*native"):
        model.generate_batch(prompts, **options)
    with attnzoo.patch(model, "sdpa", fallback="native") as handle:
        got = [output.generated_tokens for output in model.generate_batch(prompts, **options).values()]
    assert got == expected
    assert all(site.fallbacks and not site.calls for site in handle.sites)
