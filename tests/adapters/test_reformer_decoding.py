"""A patched Reformer generates the original tokens; cached decoding returns the original logits and weights."""

import copy
import math

import pytest
import torch

import attnzoo
from attnzoo.errors import InvalidArgumentError
from tests.support.models import ids
from tests.support.reformer import CHUNK, attentions, backends, local, reformer


@backends
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("prompt", [1, CHUNK - 1, CHUNK, CHUNK + 1, 11])
@pytest.mark.parametrize("layers", [["local"], ["lsh"], ["local", "lsh"]], ids="+".join)
def test_greedy_generation_returns_the_original_tokens(backend, use_cache, prompt, layers):
    model = reformer(attn_layers=layers * 2, num_hashes=2).double()  # float32 decides ties of logits by rounding
    arguments = dict(max_new_tokens=14, min_new_tokens=14, do_sample=False, use_cache=use_cache)
    expected = model.generate(ids(1, prompt), **arguments)
    with attnzoo.patch(model, backend) as handle:
        got = model.generate(ids(1, prompt), **arguments)
    assert torch.equal(got, expected)
    assert all(site.calls == 14 for site in handle.sites)


@backends
@pytest.mark.parametrize("prompt", [CHUNK - 1, 10])
def test_cached_decoding_returns_the_original_logits(backend, prompt):
    """Compare logits, since equal tokens could hide an error. Like the original, a patch mixes up two samples."""
    model = reformer(num_buckets=[2, 2], num_hashes=3).double()

    def decode():
        with torch.no_grad():
            returned = model(ids(2, prompt), use_cache=True)
            logits = [returned.logits[:, -1]]
            for step in range(9):
                token, past = ids(2, 1, seed=step), returned.past_buckets_states
                mask = torch.ones(2, 1) if step % 2 else None
                returned = model(token, past_buckets_states=past, use_cache=True, attention_mask=mask)
                logits.append(returned.logits[:, -1])
        return torch.stack(logits)

    expected = decode()
    with attnzoo.patch(model, backend):
        torch.testing.assert_close(decode(), expected, rtol=1e-9, atol=1e-9)


@backends
def test_mask_of_the_new_token_may_hide_it(backend):
    model, mask, seen = local(), torch.tensor([[1], [0]]), []
    attentions(model)[0].register_forward_hook(lambda module, args, output: seen.append(output.hidden_states))

    def decode():
        with torch.no_grad():
            past = model(ids(2, 9), use_cache=True).past_buckets_states
            return model(ids(2, 1), past_buckets_states=past, use_cache=True, attention_mask=mask).logits

    expected = decode()
    with attnzoo.patch(model, backend):
        got = decode()
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    assert got.isfinite().all()
    assert seen[-1][0].any()
    assert not seen[-1][1].any(), "padding gets zeros"


@backends
@pytest.mark.parametrize("prompt", [CHUNK - 1, 10], ids=["until there are buckets", "with buckets"])
def test_hidden_new_token_goes_into_the_padding_bucket(backend, prompt):
    model, mask = reformer(attn_layers=["lsh"]).double(), torch.tensor([[1], [0]])

    def decode():
        with torch.no_grad():
            past = model(ids(2, prompt), use_cache=True).past_buckets_states
            step = model(ids(2, 1), past_buckets_states=past, use_cache=True, attention_mask=mask)
        return step.logits[0], step.past_buckets_states.buckets_cache[0]

    expected = decode()
    assert expected[1][1].amax() > expected[1][0].amax()
    with attnzoo.patch(model, backend):
        logits, buckets = decode()
    assert torch.equal(buckets, expected[1])
    torch.testing.assert_close(logits, expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["lsh", "local"])
def test_several_tokens_on_a_filled_cache_are_refused(kind):
    model = reformer(attn_layers=[kind])
    with torch.no_grad(), attnzoo.patch(model, "eager"):
        past = model(ids(1, 9), use_cache=True).past_buckets_states
        with pytest.raises(InvalidArgumentError, match="hidden_states: got 2 tokens with a filled cache"):
            model(ids(1, 2), past_buckets_states=past, use_cache=True)


MASK = "attention_mask"


def hiding(length):
    return (torch.arange(length) > 0).long().expand(2, -1)


BAD_STEPS = {
    "a mask of all tokens": (
        "lsh",
        9,
        {MASK: hiding(10)},
        r"attention_mask: got shape .2, 10.*allowed: shape .2, 1., w",
    ),
    "a mask of other tokens": (
        "lsh",
        3,
        {MASK: hiding(5)},
        r"attention_mask: got shape .2, 5.*allowed: shape .2, 1. or .2, 4.",
    ),
    "NaN": ("lsh", 9, {MASK: torch.full((2, 1), math.nan)}, r"attention_mask: got .* with NaN"),
    "other hashes": ("lsh", 9, dict(num_hashes=3), r"num_hashes: got 3; allowed: 2, as in past_buckets_states"),
    **{
        f"other samples, {kind}": (
            kind,
            9,
            dict(input_ids=ids(3, 1)),
            r"hidden_states: got 3 samples; allowed: 2, as in",
        )
        for kind in ("lsh", "local")
    },
}


@pytest.mark.parametrize(("kind", "prompt", "changes", "message"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_step_that_does_not_fit_its_cache_is_refused(kind, prompt, changes, message):
    model = reformer(attn_layers=[kind])
    with torch.no_grad(), attnzoo.patch(model, "eager"):
        past = model(ids(2, prompt), use_cache=True).past_buckets_states
        with pytest.raises(InvalidArgumentError, match=message):
            model(**{"input_ids": ids(2, 1), "past_buckets_states": past, "use_cache": True, **changes})


@pytest.mark.parametrize(("prompt", "length"), [(9, 10), (3, 4), (3, 5)])
def test_mask_that_hides_nothing_may_have_any_length(prompt, length):
    """A user's decoding loop may pass the growing mask of all tokens to every step."""
    model = reformer(attn_layers=["lsh"])
    step = dict(input_ids=ids(2, 1), attention_mask=torch.ones(2, length), use_cache=True)
    with torch.no_grad():
        past = model(ids(2, prompt), use_cache=True).past_buckets_states
        expected = model(past_buckets_states=copy.deepcopy(past), **step).logits
        with attnzoo.patch(model, "eager"):
            torch.testing.assert_close(model(past_buckets_states=past, **step).logits, expected, rtol=1e-4, atol=1e-4)


def test_decoding_from_a_short_prompt_derives_num_buckets_where_the_original_fails():
    model = reformer(num_buckets=None)
    arguments = dict(max_new_tokens=9, min_new_tokens=9, do_sample=False, use_cache=True)
    with pytest.raises(TypeError):
        copy.deepcopy(model).generate(ids(1, 3), **arguments)
    with attnzoo.patch(model, "sdpa"):
        assert model.generate(ids(1, 3), **arguments).shape == (1, 12)
    assert model.config.num_buckets is None


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_generation_without_num_buckets_returns_the_original_tokens(use_cache):
    model = reformer(num_buckets=None)
    arguments = dict(max_new_tokens=14, min_new_tokens=14, do_sample=False, use_cache=use_cache)
    expected = copy.deepcopy(model).generate(ids(1, 9), **arguments)
    with attnzoo.patch(model, "sdpa"):
        assert torch.equal(model.generate(ids(1, 9), **arguments), expected)
    assert model.config.num_buckets is None
    assert all(module.num_buckets is None for module in attentions(model) if not hasattr(module, "query"))


@pytest.mark.parametrize("prompt", [3, 9])
def test_cached_decoding_returns_the_original_weights(prompt):
    model = reformer().double()

    def decode():
        with torch.no_grad():
            past = model(ids(1, prompt), use_cache=True).past_buckets_states
            return model(ids(1, 1), past_buckets_states=past, use_cache=True, output_attentions=True).attentions

    expected = decode()
    with attnzoo.patch(model, "eager"):
        for ours, theirs in zip(decode(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
