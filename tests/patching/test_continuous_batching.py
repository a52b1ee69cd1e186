"""Continuous batching (``generate_batch``) on a patched model: refused where the caller sees it, or left to the model.

The engine runs the model in a thread that catches every exception. A refusal in this thread would not reach the caller,
who would get requests without tokens.
"""

from __future__ import annotations

import copy
import gc
import re
import weakref

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import attnzoo
from attnzoo import KeywordRefusedError, PatchError
from tests.support.models import gpt_bigcode, gpt_neox, llama

PROMPTS = [[5, 6, 7, 8], [9, 10]]
SETTINGS = dict(
    generation_config=GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=1),
    continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, block_size=32, max_batch_tokens=32),
)
REFUSED = r"init_continuous_batching: got a patched model.*generate_batch.*; allowed: .*fallback.*native.*unpatch"
PAGED = r"(cache|layer_past): got PagedAttentionCache; allowed: None"  # the keyword that transformers uses
MODELS = [(gpt_neox, "sdpa"), (gpt_neox, "eager"), (gpt_bigcode, "sdpa")]


@pytest.fixture(params=MODELS, ids=lambda one: f"{one[0].__name__}-{one[1]}")
def model(request):
    build, implementation = request.param
    model = build()
    model.set_attn_implementation(implementation)
    return model


def entries(model):
    """Every entry point of the engine."""
    yield lambda: model.generate_batch(PROMPTS, **SETTINGS)
    yield lambda: model.init_continuous_batching(**SETTINGS)
    yield lambda: model.continuous_batching_context_manager(**SETTINGS).__enter__()


def test_continuous_batching_is_refused_when_the_engine_starts(model):
    attributes, implementation = set(vars(model)), model.config._attn_implementation
    for backend in ("sdpa", "eager", "auto"):
        with attnzoo.patch(model, backend) as handle:
            for enter in entries(model):
                with pytest.raises(PatchError, match=REFUSED):
                    enter()
            assert {site.calls for site in handle.sites} == {0}
            assert model.config._attn_implementation == implementation
        assert set(vars(model)) == attributes
        assert model.init_continuous_batching(**SETTINGS).model is model
        model.set_attn_implementation(implementation)


@pytest.mark.parametrize(
    ("implementation", "options"),
    [
        ("sdpa", dict(backend="sdpa", fallback="native")),
        ("eager", dict(backend="sdpa", fallback="native")),
        ("sdpa", dict(backend="native")),
    ],
    ids=str,
)
def test_the_models_own_code_serves_continuous_batching(implementation, options):
    model = gpt_bigcode()  # GPT-NeoX of transformers 5.24 does not support a paged cache
    model.set_attn_implementation(implementation)
    settings = SETTINGS["generation_config"]
    expected = [
        model.generate(torch.tensor([one]), generation_config=settings)[0, len(one) :].tolist() for one in PROMPTS
    ]
    with attnzoo.patch(model, **options) as handle:
        outputs = model.generate_batch(PROMPTS, warmup=False, **SETTINGS).values()
        counts = [site.calls if options["backend"] == "native" else site.fallbacks for site in handle.sites]
    assert [output.generated_tokens for output in outputs] == expected
    assert all(counts)


def test_stacked_patches_refuse_until_the_last_one_allows_it():
    model = gpt_neox()
    with attnzoo.patch(model, "sdpa"):
        with attnzoo.patch(model, "native"):
            model.init_continuous_batching(**SETTINGS)
        model.set_attn_implementation("sdpa")  # some releases leave a paged one behind
        with pytest.raises(PatchError, match=REFUSED):
            model.init_continuous_batching(**SETTINGS)
    with attnzoo.patch(model, "native"), attnzoo.patch(model, {"*.1.*": "sdpa"}), pytest.raises(PatchError):
        model.init_continuous_batching(**SETTINGS)
    model.init_continuous_batching(**SETTINGS)


def test_copies_refuse_until_they_are_unpatched():
    model = gpt_neox()
    handle = attnzoo.patch(model, "sdpa")
    twin = copy.deepcopy(model)
    handle.remove()
    with pytest.raises(PatchError, match=REFUSED):
        twin.init_continuous_batching(**SETTINGS)
    attnzoo.unpatch(twin)
    assert twin.init_continuous_batching(**SETTINGS).model is twin
    assert set(vars(twin)) == set(vars(model))


def test_the_model_is_found_inside_another_module():
    model = gpt_neox()
    outer = torch.nn.Sequential(model)
    with attnzoo.patch(outer, "sdpa"), pytest.raises(PatchError, match=REFUSED):
        model.init_continuous_batching(**SETTINGS)
    assert "init_continuous_batching" not in vars(model)


def test_another_model_with_the_same_config_is_served():
    model = gpt_neox()
    other = type(model)(model.config).eval()
    with attnzoo.patch(model, "sdpa"):
        assert other.init_continuous_batching(**SETTINGS).model is other


def test_a_handle_keeps_no_model_alive_and_outlives_it():
    model = gpt_neox()
    handle = attnzoo.patch(torch.nn.Sequential(model), "sdpa")
    gc.collect()
    assert handle.forwards[0].patch.root() is None
    handle.remove()
    assert "init_continuous_batching" not in vars(model)
    del handle
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_each_request_has_the_refusal_if_only_a_part_was_patched():
    """``generate_batch`` of the outer model is not blocked. The forward refuses the cache in the engine's thread."""
    model = gpt_neox()
    with attnzoo.patch(model.gpt_neox, "sdpa"):
        outputs = model.generate_batch(PROMPTS, warmup=False, **SETTINGS).values()
    assert [output.generated_tokens for output in outputs] == [[], []]
    assert all(re.search(PAGED, output.error) for output in outputs)


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize("build", [gpt_neox, gpt_bigcode, llama])
def test_a_forward_refuses_a_paged_cache_by_name_before_it_is_filled(build, backend):
    model, cache = build(), object.__new__(PagedAttentionCache)  # every method of this cache raises
    with attnzoo.patch(model, backend), pytest.raises(KeywordRefusedError, match=PAGED):
        model(torch.tensor([[5, 6]]), position_ids=torch.tensor([[0, 1]]), cache=cache)
