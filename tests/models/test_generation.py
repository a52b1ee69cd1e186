"""Generation: patched models give the original's tokens with every cache, and chunks of tokens equal one forward."""

import inspect

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

import attnzoo
from tests.checkpoints.train import RECIPES, windows
from tests.support.checkpoints import load
from tests.support.compare import assert_obeys_the_error_rule
from tests.support.judge import chunked, in_one_forward
from tests.support.models import FAMILIES, ids, padded

backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
searches = pytest.mark.parametrize("beams", [1, 4], ids=["greedy", "beam 4"])
CACHES = {"dynamic": {}, "static": dict(cache_implementation="static"), "none": dict(use_cache=False)}
RUNS = [
    (family, side, cache)
    for family in FAMILIES.values()
    if family.prompt is not None
    for side in ("none", "left", *(["right"] if family.build().config.is_encoder_decoder else []))
    for cache in CACHES
    if family.static_cache or cache != "static"
]


@pytest.mark.parametrize(("family", "side", "cache"), RUNS, ids=str)
@searches
@backends
def test_generated_tokens_equal_the_originals(family, side, cache, beams, backend):
    model = family.build()
    options = dict(**family.prompt(side), **CACHES[cache], num_beams=beams, do_sample=False, max_new_tokens=12)
    options["no_repeat_ngram_size"] = 2  # random models repeat themselves otherwise
    before = model.generate(**options)
    with attnzoo.patch(model, backend) as handle:
        after = model.generate(**options)
    assert torch.equal(before, after)
    assert all(site.calls for site in handle.sites)
    assert len(before.unique()) > 3  # a model that repeats itself would hide a difference


WAYS = {
    "greedy": dict(do_sample=False),
    "beam 4": dict(do_sample=False, num_beams=4),
    "sampled": dict(do_sample=True, top_k=0),
}


@pytest.mark.parametrize(
    ("family", "cache"),
    [(family, "dynamic") for family in RECIPES]
    + [(family, "static") for family in RECIPES if family != "reformer"],  # it has no static cache
)
@pytest.mark.parametrize("way", WAYS)
@backends
def test_tokens_of_trained_models_equal_the_originals(family, cache, way, backend):
    """The models may repeat themselves. Sampling draws from the whole distribution, so every logit matters."""
    model = load(family)
    text = windows(2, 96, False, torch.Generator().manual_seed(5))
    prompt = {name: value for name, value in RECIPES[family].inputs(text).items() if name != "labels"}

    def generate():
        torch.manual_seed(0)
        return model.generate(**prompt, **WAYS[way], **CACHES[cache], max_new_tokens=24)

    model.generate(**prompt, max_new_tokens=1)  # BigBird makes modules for short inputs, which draws random numbers
    before = generate()
    with attnzoo.patch(model, backend):
        after = generate()
    assert torch.equal(before, after)
    assert len(before[:, -24:].unique()) > 3


def is_decoder_with_cache(family):
    """Whether the model has no encoder and accepts several tokens with a cache of transformers (Reformer does not)."""
    parameters = inspect.signature(type(family.build()).forward).parameters
    return "past_key_values" in parameters and "decoder_input_ids" not in parameters


decoders = pytest.mark.parametrize(
    "family", [family for family in FAMILIES.values() if is_decoder_with_cache(family)], ids=str
)


@decoders
@backends
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_chunks_of_tokens_with_a_cache_equal_one_forward(family, backend, side, static):
    model, inputs = family.build(), family.inputs(24, side)
    real = inputs["attention_mask"].bool()
    with attnzoo.patch(model, backend):
        got, together = chunked(model, inputs, (16, 1, 2, 5), static), in_one_forward(model, inputs)
    original = in_one_forward(model, inputs)
    with attnzoo.patch(model, "eager"):
        reference = in_one_forward(model.double(), inputs)
    for what, values in (("chunks", got), ("one forward", together)):
        assert_obeys_the_error_rule(what, values[real], reference[real], original[real])


@decoders
@backends
def test_future_token_does_not_change_earlier_logits(family, backend):
    model, tokens = family.build(), ids(2, 24)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] - 3 + 1) % 90 + 3
    with attnzoo.patch(model, backend), torch.no_grad():
        difference = (model(tokens).logits - model(changed).logits).abs()
    assert difference[:, :15].max() == 0.0
    assert difference[:, 15:].max() > 0.1


ENCODER_DECODERS = [
    FAMILIES[name] for name in ("led", "longt5-local", "longt5-tglobal", "bigbird_pegasus", "pegasus_x")
]


@torch.no_grad()
def decoded(model, inputs, sizes, static):
    """Return the logits of decoder tokens in chunks with a cache. A static cache has room for seven more tokens."""
    encoder = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    states = model.get_encoder()(**encoder).last_hidden_state
    tokens, mask = inputs["decoder_input_ids"], inputs["decoder_attention_mask"]
    room = StaticCache(model.config, max_cache_len=tokens.shape[1] + 7) if static else DynamicCache()
    cache, logits, start = EncoderDecoderCache(room, DynamicCache()), [], 0
    for size in sizes:
        stop = start + size
        step = model(
            encoder_outputs=BaseModelOutput(states), attention_mask=inputs["attention_mask"],
            decoder_input_ids=tokens[:, start:stop], decoder_attention_mask=mask[:, :stop],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        start = stop
        logits.append(step.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", ENCODER_DECODERS, ids=str)
@backends
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static with room"])
def test_chunks_of_decoder_tokens_with_a_cache_equal_one_forward(family, backend, side, static):
    """24 tokens are further apart than ``relative_attention_max_distance``, so all distances of the bias are used.

    LED's original applies no mask in a step of one token, which then sees padding and the room of a static cache.
    """
    sizes = (16, 2, 6) if family.name == "led" else (16, 1, 2, 5)
    model, inputs = family.build(), family.inputs(24, "right")
    inputs |= dict(decoder_input_ids=ids(3, 24, seed=3), decoder_attention_mask=padded(3, 24, side))
    real = inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        original = model(**inputs).logits[real]
        with attnzoo.patch(model, backend) as handle:
            got = decoded(model, inputs, sizes, static)[real]
        assert {site.calls for site in handle.sites if ".decoder." in f".{site.name}"} == {len(sizes)}
        with attnzoo.patch(model, "eager"):
            reference = model.double()(**inputs).logits[real]
    assert_obeys_the_error_rule("chunks", got, reference, original)
