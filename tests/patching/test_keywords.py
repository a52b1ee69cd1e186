"""Keywords that a model passes to its attention: a patch ignores what the original ignores, and refuses the others.

The reference is the unpatched model: the same result, or the same TypeError.
"""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GPTNeoXModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attnzoo
from attnzoo import BackendRefusedError, KeywordRefusedError
from attnzoo.adapters.gpt_neox import SelfAttention
from attnzoo.patching.keywords import UNCOMPUTED
from tests.support.models import FAMILIES, gpt_bigcode, gpt_neox, ids, led, llama, longt5

LENGTH = 12
ENDS = torch.tensor([0, 5, LENGTH], dtype=torch.int32)
# Trainers, collators and tokenizers pass these along; none changes attention under `eager` or `sdpa`.
IGNORED = {
    "token_type_ids": dict(token_type_ids=torch.zeros(1, LENGTH, dtype=torch.long)),
    "shift_labels": dict(labels=ids(1, LENGTH), shift_labels=ids(1, LENGTH, seed=4)),
    "ignore_index": dict(labels=ids(1, LENGTH), ignore_index=5),
    "num_items_in_batch": dict(labels=ids(1, LENGTH), num_items_in_batch=torch.tensor(7)),
    "return_loss": dict(return_loss=True),
    "seq_idx": dict(seq_idx=torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)),
    "cu_seq_lens": dict(cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS, max_length_q=7, max_length_k=7),
    "output_router_logits": dict(output_router_logits=False),
    "an unknown keyword": dict(colour="blue"),
}
# Every family with its default implementation (`sdpa` for gpt_neox and gpt_bigcode), and those two with `eager` too.
LOADED = [(family, None) for family in FAMILIES.values()]
LOADED += [(FAMILIES[name], "eager") for name in ("gpt_neox", "gpt_bigcode-mqa")]
CHANGING = dict(
    sliding_window=4, softcap=30.0, s_aux=torch.zeros(2), head_mask=torch.ones(2), position_bias=torch.ones(1), cache={}
)
if "cache" in inspect.signature(GPTNeoXModel.forward).parameters:  # the model's cache, since transformers 5.24
    del CHANGING["cache"]


def outcome(model, inputs):
    """Logits (or states) and loss of a call, or the type of the error that it raises."""
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            out = model(**inputs)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        return type(error), None
    return out[1 if out.get("loss") is not None else 0], out.get("loss")


@pytest.mark.parametrize("keyword", IGNORED)
@pytest.mark.parametrize(("family", "implementation"), LOADED, ids=lambda one: str(one or "default"))
def test_a_keyword_that_the_original_ignores_is_ignored(family, keyword, implementation):
    model = family.build()
    if implementation is not None:
        model.set_attn_implementation(implementation)
    model = model.double() if family.coarse else model
    inputs = dict(input_ids=ids(1, LENGTH), **IGNORED[keyword])
    native, loss = outcome(model, inputs)
    for options in (dict(backend="sdpa"), dict(backend="eager"), dict(backend="sdpa", fallback="native")):
        with attnzoo.patch(model, **options) as handle:
            patched, patched_loss = outcome(model, inputs)
            if not isinstance(native, torch.Tensor):
                assert patched is native, "the patched model raises what the unpatched one raises, or nothing"
                continue
            assert isinstance(patched, torch.Tensor), f"{options}: {patched}"
            assert all(site.fallbacks == 0 for site in handle.sites), "ignored, not fled from"
        assert torch.allclose(patched, native, atol=1e-4 * float(native.abs().max()))
        assert (loss is None) == (patched_loss is None)
        assert loss is None or torch.allclose(loss, patched_loss, rtol=1e-4)


def decoder(build, implementation):
    """A model, its inputs with a cache, and the cache."""
    model = build()
    model.set_attn_implementation(implementation)
    cache = DynamicCache(config=model.config)
    inputs = dict(input_ids=ids(1, LENGTH), past_key_values=cache)
    if build is longt5:
        cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        inputs = dict(input_ids=ids(1, LENGTH), decoder_input_ids=ids(1, 5), past_key_values=cache)
    return model, inputs, cache


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("keyword", CHANGING)
@pytest.mark.parametrize("build", [gpt_neox, gpt_bigcode])
def test_a_keyword_that_changes_attention_is_refused_before_the_call(build, keyword, implementation):
    for backend in ("sdpa", "eager", "auto"):
        model, inputs, cache = decoder(build, implementation)
        with attnzoo.patch(model, backend) as handle, torch.no_grad():
            with pytest.raises(KeywordRefusedError, match=rf"^{keyword}: got .*; allowed: None\. .*native") as caught:
                model(**inputs, **{keyword: CHANGING[keyword]})
            assert len(str(caught.value)) < 400
            assert cache.get_seq_length() == 0, "the cache was filled by a call that was refused"
            assert {site.calls for site in handle.sites} == {0}
            got = model(**inputs).logits
        assert torch.allclose(got, model(input_ids=inputs["input_ids"]).logits, atol=1e-4)


@pytest.mark.parametrize("keyword", CHANGING)
def test_fallback_serves_a_keyword_as_the_unpatched_model_does(keyword):
    """transformers' ``sdpa`` raises for ``softcap`` and ignores the other keywords."""
    model = gpt_neox()
    inputs = dict(input_ids=ids(1, LENGTH), **{keyword: CHANGING[keyword]})
    native, _ = outcome(model, inputs)
    with attnzoo.patch(model, "sdpa", fallback="native") as handle:
        patched, _ = outcome(model, inputs)
        assert {site.calls for site in handle.sites} == {0}
        assert handle.sites[0].fallbacks == 1
    assert patched is native if isinstance(native, type) else torch.equal(patched, native)


@pytest.mark.parametrize("build", [gpt_neox, gpt_bigcode, longt5])
def test_refused_probabilities_leave_the_cache_empty(build):
    model, inputs, cache = decoder(build, "eager")
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        with pytest.raises(BackendRefusedError, match="attention probabilities"):
            model(**inputs, output_attentions=True)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["lsh", "local"])
def test_reformer_ignores_what_its_attention_ignores(name):
    """Reformer's attention accepts all keywords and reads none. The model passes none to the attention."""
    model = FAMILIES["reformer"].build()
    site = model.reformer.encoder.layers[0 if name == "local" else 1].attention.self_attention
    states = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        native = site(hidden_states=states, colour="blue").hidden_states
        with attnzoo.patch(model, "sdpa"):
            assert torch.allclose(site(hidden_states=states, colour="blue").hidden_states, native, atol=1e-4)
            with pytest.raises(KeywordRefusedError, match="head_mask"):
                site(hidden_states=states, head_mask=torch.ones(2))


def test_longt5_decoder_ignores_what_its_attention_ignores():
    model = longt5()
    site = model.decoder.block[0].layer[0].SelfAttention
    states = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        native = site(states, colour="blue")[0]
        with attnzoo.patch(model, "sdpa", fallback="native") as handle:
            assert torch.allclose(site(states, colour="blue")[0], native, atol=1e-4)
            assert sum(site.fallbacks for site in handle.sites) == 0
        with attnzoo.patch(model, "sdpa"), pytest.raises(KeywordRefusedError, match="softcap"):
            site(states, softcap=30.0)


DECODERS = {
    led: lambda model: model.led.decoder.layers[1].self_attn,
    longt5: lambda model: model.decoder.block[1].layer[0].SelfAttention,
    llama: lambda model: model.model.layers[1].self_attn,
}


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("build", DECODERS)
def test_a_cache_is_filled_by_each_name_that_the_original_knows(build, name):
    """transformers 5.24 has renamed ``past_key_values`` to ``cache``, and accepts both names."""
    model = build()
    module, states = DECODERS[build](model), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
    inputs = dict(hidden_states=states)
    if build is llama:
        inputs |= dict(position_embeddings=model.model.rotary_emb(states, torch.arange(5)[None]), attention_mask=None)

    def call():
        cache = DynamicCache(config=model.config)
        output = module(**inputs, **{name: cache})[0]
        return output, cache.get_seq_length(module.layer_idx)

    with torch.no_grad():
        try:
            expected, filled = call()
        except TypeError:
            filled = 0
        if not filled:
            pytest.skip(f"this version of transformers has no argument {name}")
        with attnzoo.patch(model, "sdpa") as handle:
            output, length = call()
    assert length == filled == 5 and sum(site.calls for site in handle.sites) == 1
    torch.testing.assert_close(output, expected)


# Keywords that a release of transformers may add


@pytest.mark.parametrize("name", [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in name])
def test_every_keyword_that_an_attention_function_declares_is_known(name):
    """A new keyword belongs in UNCOMPUTED, unless backends compute its effect. Paged functions have ``cache``."""
    core = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"}
    declared = inspect.signature(ALL_ATTENTION_FUNCTIONS[name]).parameters.values()
    names = {one.name for one in declared if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    assert names - core <= UNCOMPUTED


class _Record:
    """An :class:`attnzoo.Attend` that counts calls and may fall back."""

    def __init__(self, fallback):
        self.fallback, self.calls = fallback, 0

    def __call__(self, attention, probabilities=False):
        self.calls += 1
        return attnzoo.Result(attention.segments[0].value, "none")

    def falls_back(self, can=True):
        return self.fallback


def _declares_more(module, query, key, value, attention_mask, scaling, dropout=0.0, temperature=None, **kwargs):
    return torch.full_like(value.transpose(1, 2), 7.0 if temperature else 0.0), None


@pytest.mark.parametrize("fallback", [False, True])
def test_a_parameter_of_the_original_attention_function_is_not_ignored(fallback, monkeypatch):
    """attnzoo refuses a parameter that it does not know. With a fallback, the original computes with the parameter."""
    model = gpt_neox()
    module, states = model.gpt_neox.layers[0].attention, torch.randn(1, 3, 32)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", _declares_more)
    attend = _Record(fallback)
    forward = partial(SelfAttention().bind(type(module), attend), module)
    rotary = (torch.ones(1, 3, module.rotary_ndims), torch.zeros(1, 3, module.rotary_ndims))
    inputs = dict(attention_mask=None, position_embeddings=rotary)
    forward(states, **inputs, colour="blue")
    assert attend.calls == 1
    if fallback:
        assert torch.allclose(forward(states, **inputs, temperature=2)[0], module.dense(torch.full((1, 3, 32), 7.0)))
    else:
        with pytest.raises(KeywordRefusedError, match="temperature: got 2; allowed: None"):
            forward(states, **inputs, temperature=2)
    assert attend.calls == 1


@pytest.mark.parametrize("name", sorted(UNCOMPUTED))
def test_none_for_a_keyword_that_changes_the_result_counts_as_not_given(name):
    model, inputs = gpt_neox(), dict(input_ids=ids(1, LENGTH))
    with attnzoo.patch(model, "sdpa") as handle, torch.no_grad():
        assert torch.equal(model(**inputs, **{name: None}).logits, model(**inputs).logits)
    assert {site.calls for site in handle.sites} == {2}
