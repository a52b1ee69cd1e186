"""Pegasus-X: its attention in blocks with global tokens, alone and in the encoder."""

import pytest
import torch

import attnzoo
from attnzoo import InvalidArgumentError
from tests.support.models import ids, longt5_inputs, pegasus_x
from tests.support.weights import pack, quantise

LOWEST = torch.finfo(torch.float32).min
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])


@pytest.fixture
def model():
    return pegasus_x("PegasusXModel")


def attention_of(model, layer=0):
    return model.encoder.layers[layer].self_attn


def states(length, globals_=3, batch=2):
    random = torch.Generator().manual_seed(5)
    return torch.randn(batch, length, 32, generator=random), torch.randn(batch, globals_, 32, generator=random)


@torch.no_grad()
def hidden(model, **changes):
    return model.encoder(input_ids=ids(2, 37), **changes).last_hidden_state


@backends
def test_every_row_equals_the_originals_also_the_rows_of_padding(model, backend):
    """A padding query sees the global tokens, so its output is defined."""
    module, (tokens, global_tokens) = attention_of(model), states(24)
    mask = torch.zeros(2, 24)
    mask[0, 8:16] = mask[1] = LOWEST  # a block and a sample without tokens
    with torch.no_grad():
        expected = module(tokens, global_tokens, mask)[:2]
        with attnzoo.patch(model, backend):
            got = module(tokens, global_tokens, mask)[:2]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("length", [1, 4, 8, 9, 12, 37])
def test_staggered_layers_equal_the_originals(length, backend):
    """Every second layer pads the sequence with half a block on each side."""
    model = pegasus_x("PegasusXModel", encoder_layers=4)
    inputs = dict(input_ids=ids(2, length))
    with torch.no_grad():
        expected = model.encoder(**inputs, output_hidden_states=True).hidden_states
        with attnzoo.patch(model, backend):
            got = model.encoder(**inputs, output_hidden_states=True).hidden_states
    *layers, (last, last_global) = got
    *expected_layers, (expected_last, expected_global) = expected
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last_global, expected_global, rtol=1e-4, atol=1e-4)
    for layer, expected_layer in zip(layers, expected_layers, strict=True):
        torch.testing.assert_close(layer[:, :length], expected_layer[:, :length], rtol=1e-4, atol=1e-4)


def test_without_staggered_blocks_every_layer_has_the_same_blocks():
    model = pegasus_x("PegasusXModel", stagger_local_blocks=False)
    expected = hidden(model)
    assert (expected - hidden(pegasus_x("PegasusXModel"))).abs().max() > 0.1
    with attnzoo.patch(model, "sdpa"):
        torch.testing.assert_close(hidden(model), expected, rtol=1e-4, atol=1e-4)


def test_a_far_token_is_seen_through_the_global_tokens_only(model):
    """A change in the last block reaches the first block in the second layer, by the states of global tokens."""
    tokens = ids(1, 40)
    changed = tokens.clone()
    changed[0, -1] = tokens[0, -1] % 90 + 5
    module = attention_of(model)
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        far = [model.encoder(input_ids=given).last_hidden_state[0, 0] for given in (tokens, changed)]
        near, (states_, globals_) = [], states(40, batch=1)
        for given in (states_, torch.cat([states_[:, :-1], states_[:, -1:] + 1], dim=1)):
            near.append(module(given, globals_, torch.zeros(1, 40)))
    assert (far[0] - far[1]).abs().max() > 1e-3
    assert torch.equal(near[0][0][:, :32], near[1][0][:, :32])
    assert (near[0][1] - near[1][1]).abs().max() > 1e-3


def test_lengths_that_are_no_multiple_of_the_block_are_computed(model):
    """The original attention raises, because only the encoder pads. In a patch, the last block is shorter."""
    module, (tokens, global_tokens) = attention_of(model), states(21)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            module(tokens, global_tokens, torch.zeros(2, 21))
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, 3))
        mask = torch.zeros(2, 24)
        mask[:, 21:] = LOWEST
        expected = module(padded, global_tokens, mask)
        for backend in ("eager", "sdpa", "auto"):
            with attnzoo.patch(model, backend):
                got = module(tokens, global_tokens, torch.zeros(2, 21))
            torch.testing.assert_close(got[0], expected[0][:, :21], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (None, "NoneType"),
        (torch.zeros(2, 16), r"shape \(2, 16\)"),
        (torch.ones(2, 24), "with other values"),
        (torch.full((2, 24), float("nan")), "with other values"),
        (torch.ones(2, 24, dtype=torch.long), "with other values"),
    ],
    ids=["none", "short", "ones", "nan", "integers"],
)
def test_masks_that_the_encoder_does_not_make_are_refused(model, mask, got):
    module, (tokens, global_tokens) = attention_of(model), states(24)
    with attnzoo.patch(model, "sdpa") as handle:
        with pytest.raises(InvalidArgumentError, match=rf"attention_mask: got .*{got}.*; allowed: "):
            module(tokens, global_tokens, mask)
        assert not handle.sites[0].calls


@backends
def test_a_mask_per_sample_under_vmap(model, backend):
    module, (tokens, global_tokens) = attention_of(model), states(24)
    mask = torch.zeros(2, 24)
    mask[1, 20:] = LOWEST

    def run(*given):
        return module(*(tensor[None] for tensor in given))[:2]

    with torch.no_grad():
        expected = torch.func.vmap(run)(tokens, global_tokens, mask)
        with attnzoo.patch(model, backend):
            torch.testing.assert_close(
                torch.func.vmap(run)(tokens, global_tokens, mask), expected, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("change", [pack, quantise], ids=["only linear()", "quantize_dynamic"])
def test_weights_that_only_support_linear(change):
    model, inputs = pegasus_x(), longt5_inputs(24, "right")
    model, real = change(model), inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[real]
        with attnzoo.patch(model, "sdpa"):
            torch.testing.assert_close(model(**inputs).logits[real], expected, atol=1e-3, rtol=1e-3)


def test_auto_runs_the_original_for_short_inputs_and_names_the_reason(model):
    with attnzoo.patch(model, "auto") as handle:
        hidden(model)
    (choice,) = handle.sites[0].selections
    assert "chunks" in choice.reason and handle.sites[0].kernel == "native"


def test_cross_attention_has_a_pattern_without_distances(model):
    """Approximate backends do not change patterns without distances."""
    seen = {}
    with attnzoo.patch(model, "eager") as handle, torch.no_grad():
        for site in handle.sites:
            site.observer = lambda site, attention, *_: seen.setdefault(site.name, attention.segments[0].pattern)
        model(input_ids=ids(2, 24), decoder_input_ids=ids(2, 5))
    assert seen["decoder.layers.0.encoder_attn"] == attnzoo.Full(cross=True)
    assert seen["decoder.layers.0.self_attn"] == attnzoo.Causal(offset=0)
