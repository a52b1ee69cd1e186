"""A patched module that has already run notices what the next call asks for, before it touches the cache.

The plan of a site keeps the states of calls that its backend has supported. A stale state would hide a refusal.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.autograd import forward_ad
from transformers import DynamicCache

import attnzoo
from attnzoo import BackendRefusedError
from attnzoo.errors import KeywordRefusedError
from attnzoo.patching import forwards, interface
from attnzoo.registry import registry
from tests.support.models import FAMILIES

NOTHING = dict(
    dtypes=frozenset({torch.float32}), dropout=False, grad=False, mask=False, key_mask=False, probabilities=False,
    transforms=frozenset(),
)  # fmt: skip


@pytest.fixture
def model():
    """A GPT-NeoX with dropout, without a patch. Its weights do not require grad."""
    model = FAMILIES["gpt_neox"].build().requires_grad_(False)
    model.set_attn_implementation("eager")  # `sdpa` of transformers does not accept `output_attentions` in the config
    for layer in model.gpt_neox.layers:
        layer.attention.attention_dropout = 0.25
    return model


class Decoding:
    """Decoding steps of one token, on a cache of three tokens."""

    def __init__(self, model):
        self.model, self.token, self.cache = model, torch.tensor([[5]]), DynamicCache()
        with torch.no_grad():
            for token in (3, 4, 5):
                model(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)

    def step(self, **more):
        if "inputs_embeds" not in more:
            more["input_ids"] = self.token
        return self.model(past_key_values=self.cache, use_cache=True, **more).logits

    @property
    def length(self):
        return self.cache.get_seq_length()


@contextmanager
def in_half(decoding):
    decoding.model.to(torch.bfloat16)
    for layer in decoding.cache.layers:
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    yield {}


@contextmanager
def autocast(decoding):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield {}


@contextmanager
def trained_weights(decoding):
    decoding.model.requires_grad_(True)
    with torch.enable_grad():
        yield {}


@contextmanager
def inputs_that_require_grad(decoding):
    embeddings = decoding.model.get_input_embeddings()(decoding.token)
    with torch.enable_grad():
        yield dict(inputs_embeds=embeddings.detach().requires_grad_())


@contextmanager
def training(decoding):
    decoding.model.train()
    yield {}


@contextmanager
def tangents(decoding):
    embeddings = decoding.model.get_input_embeddings()(decoding.token)
    with forward_ad.dual_level():
        yield dict(inputs_embeds=forward_ad.make_dual(embeddings, embeddings))


@contextmanager
def probabilities(decoding):
    yield dict(output_attentions=True)


@contextmanager
def probabilities_by_config(decoding):
    decoding.model.config.output_attentions = True
    yield {}


@contextmanager
def another_machine(decoding):
    type(attnzoo.handle(decoding.model).forwards[0].plan.backend).unavailable = classmethod(lambda cls: "was removed")
    registry.forget()
    yield {}


@contextmanager
def a_keyword(decoding):
    yield dict(sliding_window=3)


CHANGES = {
    in_half: (BackendRefusedError, "dtype: got bfloat16; allowed: float32"),
    autocast: (BackendRefusedError, "dtype: got bfloat16; allowed: float32"),
    trained_weights: (BackendRefusedError, "grad: got True"),
    inputs_that_require_grad: (BackendRefusedError, "grad: got True"),
    training: (BackendRefusedError, "dropout: got True"),
    tangents: (BackendRefusedError, "torch.func transform: got jvp"),
    probabilities: (BackendRefusedError, "attention probabilities: got True"),
    probabilities_by_config: (BackendRefusedError, "attention probabilities: got True"),
    another_machine: (BackendRefusedError, "was removed"),
    a_keyword: (KeywordRefusedError, "sliding_window"),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_after_a_warm_call_is_refused_before_the_cache_is_touched(add_backend, model, change):
    add_backend("narrow", **NOTHING)
    error, text = CHANGES[change]
    with attnzoo.patch(model, "narrow") as handle, torch.no_grad():
        decoding = Decoding(model)
        decoding.step()
        length, calls = decoding.length, [site.calls for site in handle.sites]
        with change(decoding) as more, pytest.raises(error, match=text):
            decoding.step(**more)
        assert decoding.length == length and [site.calls for site in handle.sites] == calls


def test_every_refusal_of_a_warm_call_is_listed(add_backend, model):
    add_backend("narrow", **NOTHING)
    with attnzoo.patch(model, "narrow"), torch.no_grad():
        decoding = Decoding(model)
        model.train()
        with autocast(decoding), pytest.raises(BackendRefusedError) as caught:
            decoding.step(output_attentions=True)
    assert all(field in str(caught.value) for field in ("dtype", "dropout", "attention probabilities"))


def test_a_supported_call_after_a_refusal_runs_and_a_refusal_is_never_kept(add_backend, model):
    add_backend("narrow", **NOTHING)
    with attnzoo.patch(model, "narrow"), torch.no_grad():
        decoding = Decoding(model)
        for _ in range(2):
            with pytest.raises(BackendRefusedError):
                decoding.step(output_attentions=True)
            decoding.step()
    assert decoding.length == 5


def test_a_mask_that_appears_is_refused(add_backend, model):
    add_backend("narrow", **NOTHING)
    with attnzoo.patch(model, "narrow"), torch.no_grad():
        decoding = Decoding(model)
        decoding.step()
        with pytest.raises(BackendRefusedError, match="key_mask: got True"):
            decoding.step(attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_bigcode-mqa", "led", "longt5-local"])
def test_masks_and_lengths_that_change_between_calls_are_read(name):
    """Outputs of a warm model equal those of a model that was patched just now."""
    family = FAMILIES[name]
    model = family.build()
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        for length, side in ((20, "none"), (20, "left"), (20, "none"), (7, "left"), (20, "right"), (33, "none")):
            given, fresh = family.inputs(length, side), copy.deepcopy(model)
            attnzoo.unpatch(fresh)
            with attnzoo.patch(fresh, "sdpa"):
                assert torch.equal(model(**given).logits, fresh(**given).logits)


def test_threads_share_a_model(model):
    """Each thread decodes with a separate cache. Some threads make requests that the backend refuses."""

    def decode(number):
        decoding, refused = Decoding(model), 0
        for step in range(6):
            if (number + step) % 3 == 0:
                with pytest.raises(BackendRefusedError):
                    decoding.step(output_attentions=True)
                refused += 1
            with torch.no_grad():
                logits = decoding.step()
        return refused, logits

    with attnzoo.patch(model, "sdpa") as handle:
        expected = decode(0)[1]
        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(decode, range(8)))
        assert all(refused == 2 and torch.equal(logits, expected) for refused, logits in results)
        assert {site.kernel for site in handle.sites} == {"flash"}


def test_this_pytorch_has_the_private_function_that_shows_the_compiler():
    seen = []
    look = torch.compiler.disable(lambda: seen.append(forwards._compiler_callback()), recursive=False)
    torch.compile(lambda x: (look(), x + 1)[1], backend="eager")(torch.ones(1))
    assert len(seen) == 1 and seen[0] is not None and forwards._compiler_callback() is None


def test_this_transformers_has_the_private_attribute_of_output_attentions(model):
    for value in (True, False):
        model.config.output_attentions = value
        assert object.__getattribute__(model.config, "_output_attentions") is value
    assert interface._asks_for_probabilities(type("Config", (), {"output_attentions": True})())
    assert not interface._asks_for_probabilities(object())
