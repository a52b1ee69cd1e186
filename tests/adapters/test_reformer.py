"""A patched Reformer equals the original: logits, gradients, training, every head class; a patch leaves no trace."""

import copy
import math

import pytest
import torch
import transformers

import attnzoo
from attnzoo.errors import BackendRefusedError, InvalidArgumentError
from tests.support.models import ids
from tests.support.reformer import (
    CHUNK,
    assert_model_equals_the_original,
    attentions,
    backends,
    causal,
    hidden,
    local,
    padding,
    reformer,
    sides,
)


@backends
@causal
@sides
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2, 64])
def test_logits_equal_the_original(is_decoder, backend, side, length):
    arguments = dict(input_ids=ids(3, length), attention_mask=padding(side, 3, length))
    assert_model_equals_the_original(reformer(is_decoder=is_decoder), arguments, backend)


@backends
@causal
@pytest.mark.parametrize("side", ["none", "left", "sample"])
def test_gradients_of_reversible_layers_equal_the_original(is_decoder, backend, side):
    arguments = dict(input_ids=ids(3, 64), attention_mask=padding(side, 3, 64))
    model = reformer(is_decoder=is_decoder, num_hashes=3, num_buckets=8)
    assert_model_equals_the_original(model, arguments, backend, train=True)


@backends
def test_gradients_of_a_short_input_equal_the_original(backend):
    arguments = dict(input_ids=ids(3, CHUNK), attention_mask=None)
    model = reformer(axial_pos_shape=[2, 2])
    assert_model_equals_the_original(model, arguments, backend, train=True)


@backends
def test_different_chunk_lengths_equal_the_original(backend):
    model = reformer(is_decoder=False, lsh_attn_chunk_length=8, local_num_chunks_after=1, num_buckets=None)
    for length in (3, 5, 8, 13, 33):
        arguments = dict(input_ids=ids(2, length), attention_mask=padding("right", 2, length))
        assert_model_equals_the_original(model, arguments, backend)


def test_inputs_reveal_a_lost_mask_or_other_buckets():
    model, mask = reformer(), padding("left", 3, 40)
    with torch.no_grad():
        before = model(ids(3, 40), attention_mask=mask).logits
        changed = [model(ids(3, 40)).logits, model(ids(3, 40), attention_mask=mask, num_hashes=1).logits]
    for after in changed:
        assert (after - before)[mask.bool()].abs().max() > 0.1


HEADS = ["ReformerModel", "ReformerForSequenceClassification", "ReformerForQuestionAnswering"]


@pytest.mark.parametrize("cls", HEADS)
def test_head_classes_equal_the_original(cls):
    model = reformer(cls, is_decoder=False, num_labels=2).double()
    arguments = dict(input_ids=ids(2, 21), attention_mask=padding("right", 2, 21), return_dict=False)
    with torch.no_grad():
        expected = model(**arguments)[0]
        with attnzoo.patch(model, "sdpa") as handle:
            got = model(**arguments)[0]
    assert all(site.calls == 1 for site in handle.sites)
    real = arguments["attention_mask"].bool() if expected.shape[:2] == (2, 21) else ...
    torch.testing.assert_close(got[real], expected[real], rtol=1e-9, atol=1e-9)


# --- training


@backends
@pytest.mark.parametrize("kind", ["lsh", "local"])
def test_dropout_applies_in_training_only(backend, kind):
    changes = dict(lsh_attention_probs_dropout_prob=0.5, local_attention_probs_dropout_prob=0.5)
    model = reformer(attn_layers=[kind, kind], hash_seed=None, **changes)
    torch.manual_seed(5)
    with attnzoo.patch(model, backend), torch.no_grad():
        module, states = attentions(model)[0], hidden(2, 16)
        buckets = module(states).buckets if kind == "lsh" else None
        kept, again = (module(states, buckets=buckets).hidden_states for _ in range(2))
        assert torch.equal(kept, again)
        model.train()
        dropped = torch.stack([module(states, buckets=buckets).hidden_states for _ in range(400)])
    assert not torch.allclose(dropped[0], dropped[1], atol=1e-2)
    torch.testing.assert_close(dropped.mean(0), kept, rtol=0.0, atol=0.5)


@backends
def test_reversible_layers_repeat_their_dropout_in_the_backward(backend):
    """Local layers draw no other random numbers, so the backward can reconstruct the inputs."""
    model = local(local_attention_probs_dropout_prob=0.3).train()
    seen = []
    attentions(model)[0].register_forward_hook(lambda module, args, output: seen.append(output.hidden_states.detach()))
    with attnzoo.patch(model, backend):
        model(ids(2, 64)).logits.square().sum().backward()
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-4)


def test_training_steps_follow_the_original():
    def losses(backend):
        model = reformer().train()
        if backend:
            attnzoo.patch(model, backend)
        optimiser, values = torch.optim.SGD(model.parameters(), lr=0.01), []
        for step in range(4):
            optimiser.zero_grad()
            loss = model(ids(2, 64, seed=step), labels=ids(2, 64, seed=step)).loss
            loss.backward()
            optimiser.step()
            values.append(loss.item())
        return values

    original = losses(None)
    assert original[0] != original[-1]
    for backend in ("eager", "sdpa"):
        assert losses(backend) == pytest.approx(original, rel=1e-3)


# --- padding, attention weights


@backends
@pytest.mark.parametrize("kind", ["lsh", "local"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_zero_output_and_zero_gradient(backend, kind, side):
    model, mask = reformer(attn_layers=[kind]), padding(side, 3, 16)
    mask[2] = 0
    states = hidden(3, 16).requires_grad_()
    with attnzoo.patch(model, backend):
        output = attentions(model)[0](states, attention_mask=mask).hidden_states
    assert (output[~mask.bool()] == 0).all()
    output.square().sum().backward()
    assert states.grad.isfinite().all()
    assert (states.grad[~mask.bool()] == 0).all()
    assert (states.grad[mask.bool()] != 0).any()


@causal
@pytest.mark.parametrize("length", [3, CHUNK, 2 * CHUNK, 24])
@pytest.mark.parametrize("around", [(1, 0), (2, 1)], ids=str)
def test_attention_weights_equal_the_original(is_decoder, length, around):
    before, after = around
    model = reformer(
        is_decoder=is_decoder, num_hashes=2, lsh_num_chunks_before=before, lsh_num_chunks_after=after,
        local_num_chunks_before=before, local_num_chunks_after=after,
    ).double()  # fmt: skip
    with torch.no_grad():
        expected = model(ids(2, length), output_attentions=True).attentions
        with attnzoo.patch(model, "eager"):
            got = model(ids(2, length), output_attentions=True).attentions
    assert len(got) == len(expected) == 4
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@causal
@pytest.mark.parametrize("kind", ["lsh", "local"])
@pytest.mark.parametrize("length", [CHUNK, 16])
def test_attention_weights_include_dropout(is_decoder, kind, length):
    rate = dict(lsh_attention_probs_dropout_prob=0.5, local_attention_probs_dropout_prob=0.5)
    model = reformer(attn_layers=[kind], is_decoder=is_decoder, **rate)
    module, states = attentions(model)[0], hidden(2, length)
    arguments = dict(buckets=module(states).buckets) if kind == "lsh" and length > CHUNK else {}
    with torch.no_grad(), attnzoo.patch(model, "eager"):
        kept = module(states, output_attentions=True, **arguments).attention_probs
        model.train()
        dropped = module(states, output_attentions=True, **arguments).attention_probs
    seen = kept > 1e-6
    seen &= seen.sum(-1, keepdim=True) > 2  # leave out tokens that see only themselves
    zeroed = seen & (dropped == 0)
    assert 0.35 < zeroed.sum() / seen.sum() < 0.65
    torch.testing.assert_close(dropped[seen & ~zeroed], 2 * kept[seen & ~zeroed])


def test_attention_weights_are_empty_by_default_and_refused_by_fused_backends():
    model = reformer()
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        assert all(module(hidden(2, 16)).attention_probs == () for module in attentions(model))
        with pytest.raises(BackendRefusedError, match=r"eager"):
            model(ids(2, 16), output_attentions=True)


# --- errors


def test_length_that_is_no_multiple_of_the_chunk_is_refused():
    model = reformer(attn_layers=["local", "lsh"], num_hashes=1)
    with attnzoo.patch(model, "eager"):
        for module in attentions(model):
            with pytest.raises(InvalidArgumentError, match=r"hidden_states: got 9 tokens.*chunk length 4"):
                module(hidden(2, 9))


def test_bad_arguments_are_refused_by_name():
    model = reformer(attn_layers=["local", "lsh"])
    mask = torch.ones(2, 8)
    with attnzoo.patch(model, "eager"):
        for module in attentions(model):
            with pytest.raises(InvalidArgumentError, match=r"attention_mask: got .* with NaN"):
                module(hidden(2, 8), attention_mask=mask.masked_fill(mask > 0, math.nan))
            with pytest.raises(
                InvalidArgumentError, match=r"attention_mask: got shape .2, 7.*allowed: .* of shape .1 or 2, 8."
            ):
                module(hidden(2, 8), attention_mask=torch.ones(2, 7))
            with pytest.raises(InvalidArgumentError, match="position_bias"):
                module(hidden(2, 8), position_bias=torch.ones(1))
        with pytest.raises(InvalidArgumentError, match="buckets"):
            attentions(model)[1](hidden(2, 8), buckets=torch.zeros((2, 3, 2, 8), dtype=torch.long))


@pytest.mark.parametrize("hashes", [0, -1, 2.0, "2"])
@pytest.mark.parametrize("length", [3, 16])
def test_invalid_num_hashes_is_refused(hashes, length):
    model = reformer()
    with attnzoo.patch(model, "sdpa"), pytest.raises(InvalidArgumentError, match=r"num_hashes: got .*integer >= 1"):
        model(ids(2, length), num_hashes=hashes)


def test_training_refuses_num_hashes_that_the_backward_does_not_know():
    model = reformer().train()
    with attnzoo.patch(model, "sdpa"):
        loss = model(ids(2, 64), num_hashes=3).logits.sum()
        with pytest.raises(
            InvalidArgumentError, match=r"buckets: got shape .2, 3, 3, 64.*allowed: shape .2, 3, 2, 64. for 2 hash"
        ):
            loss.backward()


# --- a patch leaves no trace


@pytest.mark.parametrize("hash_seed", [7, None])
def test_patch_and_explain_keep_config_and_random_stream(hash_seed):
    model = reformer(num_buckets=None, hash_seed=hash_seed)
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    handle = attnzoo.patch(model, "sdpa")
    attnzoo.explain(model)
    str(handle)
    copy.deepcopy(model)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        model(ids(2, 32))
    handle.remove()
    assert model.config.to_dict() == config
    assert all("forward" not in vars(module) for module in attentions(model))


@pytest.mark.parametrize("hash_seed", [7, None])
def test_verify_keeps_config_and_random_stream(hash_seed):
    model = reformer(num_buckets=None, hash_seed=hash_seed)
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    inputs = dict(input_ids=ids(2, 32), attention_mask=padding("left", 2, 32))
    report = attnzoo.verify(model, inputs, "sdpa", gradients=False)
    assert all(site.ok for site in report.sites), str(report)
    assert len(report.sites) == 4
    assert model.config.to_dict() == config
    assert all(getattr(module, "num_buckets", None) is None for module in attentions(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_patched_model_can_be_saved(tmp_path):
    model = reformer(num_buckets=None)
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        expected = model(ids(2, 32)).logits
        model.save_pretrained(tmp_path)
    loaded = transformers.ReformerModelWithLMHead.from_pretrained(tmp_path)
    assert loaded.config.num_buckets is None
    with torch.no_grad(), attnzoo.patch(loaded.eval(), "sdpa"):
        torch.testing.assert_close(loaded(ids(2, 32)).logits, expected)


@pytest.mark.parametrize("changes", [{}, dict(hash_seed=None), dict(num_buckets=None), dict(is_decoder=False)], ids=str)
def test_verify_replays_the_buckets_in_all_runs(changes):
    model = reformer(**changes)
    before = model.config.to_dict()
    report = attnzoo.verify(model, dict(input_ids=ids(2, 10 * CHUNK, seed=0)), "sdpa")
    assert report.ok, str(report)
    (logits,) = report.end_to_end
    assert logits.error < 1e-4, "other rotations would change logits by whole numbers"
    assert "training mode" in report.note and "training mode" in str(report)
    assert model.config.to_dict() == before
