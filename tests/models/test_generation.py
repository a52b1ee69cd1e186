"""Generation: patched gives the original's tokens, with every cache, and chunks of tokens equal one forward."""

import pytest
import torch

import attnzoo
from attnzoo.error_rule import FORWARD, check

from .zoo import FAMILIES, ids

BACKENDS = ["eager", "sdpa"]
generating = [family for family in FAMILIES.values() if family.prompt is not None]
families = pytest.mark.parametrize("family", generating, ids=[family.name for family in generating])
backends = pytest.mark.parametrize("backend", BACKENDS)
SEARCHES = {"greedy": dict(do_sample=False), "beam 4": dict(num_beams=4, do_sample=False)}


@families
@backends
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_tokens_are_the_originals(family, backend, side, search, cache):
    if cache == "static" and not family.static_cache:
        pytest.skip(f"{family.name} has no static cache")
    model, prompt = family.build(), family.prompt(side)
    extra = dict(max_new_tokens=12, no_repeat_ngram_size=2)  # random models like to repeat themselves for ever
    if cache == "static":
        extra["cache_implementation"] = "static"
    before = model.generate(**prompt, **search, **extra)
    with attnzoo.patch(model, backend) as handle:
        after = model.generate(**prompt, **search, **extra)
    assert torch.equal(before, after)
    assert all(site.calls for site in handle.sites)
    assert len(before.unique()) > 3  # else the model repeats itself and would hide a difference


@families
@backends
def test_without_a_cache_the_tokens_are_the_same(family, backend):
    model, prompt = family.build(), family.prompt("left")
    with attnzoo.patch(model, backend):
        cached = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        uncached = model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


decoders = pytest.mark.parametrize(
    "family", [f for f in generating if not f.build().config.is_encoder_decoder], ids=lambda family: family.name
)


@decoders
@backends
@pytest.mark.parametrize("side", ["none", "left"])
def test_chunks_of_new_tokens_on_a_cache_equal_one_forward(family, backend, side):
    inputs = family.inputs(24, side)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def chunked(model):
        cache, logits, start = None, [], 0
        for size in (16, 1, 2, 5):
            stop = start + size
            step = model(
                input_ids=tokens[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache, start = step.past_key_values, stop
            logits.append(step.logits)
        return torch.cat(logits, dim=1)[mask.bool()]

    def whole(model):
        return model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits[mask.bool()]

    model = family.build()
    with torch.no_grad():
        with attnzoo.patch(model, backend):
            got, together = chunked(model), whole(model)
        original = whole(model)
        with attnzoo.patch(model, "eager"):
            reference = whole(model.double())
    for what, values in (("chunks", got), ("one forward", together)):
        verdict = check(what, values, reference, original, FORWARD)
        assert verdict.ok, str(verdict)


@decoders
@backends
def test_a_future_token_changes_nothing_earlier(family, backend):
    model, tokens = family.build(), ids(2, 24)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] - 3 + 1) % 90 + 3
    with attnzoo.patch(model, backend), torch.no_grad():
        difference = (model(tokens).logits - model(changed).logits).abs()
    assert difference[:, :15].max() == 0.0
    assert difference[:, 15:].max() > 0.1
