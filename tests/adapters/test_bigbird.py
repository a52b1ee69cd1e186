"""BigBird: random blocks, copies of the first block, the switch to full attention, and its decoder."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import attnzoo
from attnzoo import InvalidArgumentError, PatchError
from attnzoo.backends.eager import EagerBackend
from attnzoo.spec.chosen_blocks import ChosenBlocks
from tests.support.models import bigbird, bigbird_pegasus, causal_inputs, ids, padded

backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
SHORT, LONG = 14, 24  # inputs of up to 14 tokens get full attention


def logits(model, length=LONG, side="left"):
    inputs = causal_inputs(length, side)
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def attentions(handle):
    """Return a list that receives every later attention, and the name of its site."""
    seen = []
    for site in handle.sites:
        site.observer = lambda site, attention, *_: seen.append((site.name, attention))
    return seen


@backends
@pytest.mark.parametrize(("length", "block", "number"), [(24, 2, 1), (25, 2, 3), (60, 4, 2), (1024, 16, 3)])
def test_training_sees_the_random_blocks_of_the_original(length, block, number, backend):
    """For 1024 tokens, the model draws blocks in another way, and may draw a block of the window or the last block."""
    model = bigbird(num_hidden_layers=1, block_size=block, num_random_blocks=number, max_position_embeddings=1088)
    evaluated = logits(model, length)
    expected = logits(model.train(), length)
    state = np.random.get_state()[1:3]
    assert (expected - evaluated).abs().max() > 0.1, "random blocks change the result"
    np.random.seed(99)
    with attnzoo.patch(model, backend):
        same(logits(model, length), expected)
    assert all(np.array_equal(got, before) for got, before in zip(np.random.get_state()[1:3], state, strict=True))


def test_layers_draw_different_blocks_and_every_call_the_same():
    model = bigbird().train()
    with attnzoo.patch(model, "eager") as handle:
        seen = attentions(handle)
        logits(model)
        logits(model)
    chosen = [a.segments[3].pattern.chosen for _, a in seen if len(a.segments) == 4]
    assert len(chosen) == 4
    assert torch.equal(chosen[0], chosen[2]) and torch.equal(chosen[1], chosen[3])
    assert not torch.equal(chosen[0], chosen[1])


@backends
@pytest.mark.parametrize("number", [1, 3])
def test_evaluation_counts_the_first_block_once_per_random_block_more(number, backend):
    model = bigbird(num_random_blocks=number)
    expected = logits(model, 48)
    with attnzoo.patch(model, backend) as handle:
        seen = attentions(handle)
        same(logits(model, 48), expected)
    _, attention = seen[0]
    assert float(attention.segments[1].bias.values) == pytest.approx(np.log(1 + number))


@backends
def test_a_short_input_switches_to_full_attention_and_the_patch_stays(backend):
    original, model = bigbird(), bigbird()
    with attnzoo.patch(model, backend) as handle:
        seen = attentions(handle)
        for length in (LONG, SHORT, LONG):
            same(logits(model, length), logits(original, length))
        assert [site.calls for site in handle.sites] == [2 + 1 + 1] * 2
    assert {len(attention.segments) for _, attention in seen[4:]} == {1}
    assert model.bert.attention_type == original.bert.attention_type == "original_full"
    assert model.state_dict().keys() == original.state_dict().keys()
    same(logits(model), logits(original))


def test_auto_runs_the_original_before_and_after_the_switch_but_not_under_autocast():
    """Under autocast, the original of block-sparse attention raises."""
    model = bigbird()
    with attnzoo.patch(model, "auto") as handle:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits(model, LONG)
        assert "native" not in handle.sites[0].kernels
        before = handle.sites[0].calls
        for length in (LONG, SHORT, LONG):
            logits(model, length)
        assert handle.sites[0].kernels["native"] == 3 == handle.sites[0].calls - before


def test_block_sparse_attention_has_no_dropout_and_full_attention_has_that_of_the_config():
    model = bigbird(attention_probs_dropout_prob=0.25).train()
    with attnzoo.patch(model, "eager") as handle:
        seen = attentions(handle)
        logits(model, LONG)
        assert {attention.dropout for _, attention in seen} == {0.0}
        seen.clear()
        logits(model, SHORT)
        assert {attention.dropout for _, attention in seen} == {0.25}


def test_hooks_on_the_module_inside_run_once_and_see_its_output():
    model, seen = bigbird(), []
    inner = model.bert.encoder.layer[0].attention.self
    inner.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    with attnzoo.patch(model, "sdpa"):
        logits(model)
    assert seen == [(3, LONG, 32)]
    assert "forward" not in vars(inner)


@backends
@pytest.mark.parametrize("cached", [False, True])
def test_a_decoder_with_cross_attention_equals_the_original(cached, backend):
    model = bigbird("BigBirdForCausalLM", is_decoder=True, add_cross_attention=True, attention_type="original_full")
    states, mask = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4)), padded(2, 9, "left")
    source = padded(2, 7, "right")

    @torch.no_grad()
    def run():
        cache, parts = DynamicCache() if cached else None, []
        for start, stop in ((0, 6), (6, 7), (7, 9)) if cached else ((0, 9),):
            step = model(
                ids(2, 9)[:, start:stop], attention_mask=mask[:, :stop], encoder_hidden_states=states,
                encoder_attention_mask=source, past_key_values=cache, use_cache=cached,
            )  # fmt: skip
            parts.append(step.logits)
        return torch.cat(parts, dim=1)[mask.bool()]

    expected = run()
    with attnzoo.patch(model, backend) as handle:
        assert [site.name.rpartition(".")[2] for site in handle.sites] == ["attention", "crossattention"] * 2
        same(run(), expected)
        assert all(site.calls for site in handle.sites)


def test_masks_with_other_values_are_refused_before_a_result():
    model = bigbird()
    mask = torch.ones(3, LONG)
    mask[0, 3] = 0.5
    with attnzoo.patch(model, "sdpa"), pytest.raises(InvalidArgumentError, match=r"attention_mask: got .*other values"):
        model(ids(3, LONG), attention_mask=mask)


def test_lengths_and_masks_that_the_model_does_not_make_are_refused():
    model = bigbird()
    module, states = model.bert.encoder.layer[0].attention, torch.randn(1, 25, 32)
    with attnzoo.patch(model, "sdpa"):
        with pytest.raises(InvalidArgumentError, match=r"hidden_states: got 25 tokens; allowed: a multiple of .* 2"):
            module(states, to_mask=torch.ones(1, 1, 1, 25))
        with pytest.raises(InvalidArgumentError, match=r"to_mask: got NoneType.*; allowed: "):
            module(states[:, :24])
        with pytest.raises(InvalidArgumentError, match=r"encoder_hidden_states: got .*; allowed: None"):
            module(states[:, :24], to_mask=torch.ones(1, 1, 1, 24), encoder_hidden_states=states)


def test_another_module_inside_is_refused():
    class Other(torch.nn.Identity):
        pass

    model = bigbird()
    model.bert.encoder.layer[1].attention.self = Other()
    with pytest.raises(PatchError, match=r"BigBirdAttention\.self: got Other; allowed: BigBirdSelfAttention or"):
        attnzoo.patch(model, "sdpa")


@backends
def test_the_encoder_of_bigbird_pegasus_switches_too(backend):
    original, model = bigbird_pegasus("BigBirdPegasusModel"), bigbird_pegasus("BigBirdPegasusModel")
    with attnzoo.patch(model, backend), torch.no_grad():
        for length in (LONG, SHORT, LONG):
            inputs = dict(input_ids=ids(2, length), attention_mask=padded(2, length, "right"))
            real = inputs["attention_mask"].bool()
            same(model.encoder(**inputs)[0][real], original.encoder(**inputs)[0][real])
    assert model.encoder.attention_type == "original_full"


def test_a_call_in_another_mode_is_checked_again(add_backend):
    """In training, the model requests random blocks. A backend without them falls back before the forward starts."""
    add_backend("no-random-blocks", patterns=EagerBackend.capabilities.patterns - {ChosenBlocks})
    model = bigbird().eval()
    with attnzoo.patch(model, "no-random-blocks", fallback="native") as handle:
        logits(model)
        calls = sum(site.calls for site in handle.sites)
        assert calls and not any(site.fallbacks for site in handle.sites)
        logits(model.train())
        assert sum(site.calls for site in handle.sites) == calls and all(site.fallbacks for site in handle.sites)
        logits(model.eval())
        assert sum(site.calls for site in handle.sites) > calls


@backends
def test_an_encoder_with_a_language_head_generates_the_original_tokens(backend):
    """transformers only warns about it. The mask of a step is longer than the tokens, because there is a cache."""
    model, inputs = bigbird("BigBirdForCausalLM"), causal_inputs(12, "left")
    arguments = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = model.generate(**inputs, **arguments)
    with attnzoo.patch(model, backend):
        assert torch.equal(model.generate(**inputs, **arguments), expected)
