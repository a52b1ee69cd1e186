"""Reformer patched equals Reformer as a whole: logits, gradients, training, every head; and nothing is left behind."""

import copy
import math

import pytest
import torch
import transformers

import attnzoo
from attnzoo.adapters.reformer import REFORMER
from attnzoo.errors import BackendRefusedError, InvalidArgumentError
from attnzoo.originals.drift import drift
from tests.support.reformer import (
    CHUNK,
    VOCAB,
    assert_model_equals_the_original,
    attentions,
    backends,
    causal,
    hidden,
    ids,
    local,
    padding,
    reformer,
    sides,
)


@backends
@causal
@sides
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2, 64])
def test_logits(is_decoder, backend, side, length):
    arguments = dict(input_ids=ids(3, length), attention_mask=padding(side, 3, length))
    assert_model_equals_the_original(reformer(is_decoder=is_decoder), arguments, backend)


@backends
@causal
@pytest.mark.parametrize("side", ["none", "left", "sample"])
def test_gradients_through_the_reversible_layers(is_decoder, backend, side):
    arguments = dict(input_ids=ids(3, 64), attention_mask=padding(side, 3, 64))
    model = reformer(is_decoder=is_decoder, num_hashes=3, num_buckets=8)
    assert_model_equals_the_original(model, arguments, backend, train=True)


@backends
def test_gradients_of_a_short_input(backend):
    arguments = dict(input_ids=ids(3, CHUNK), attention_mask=None)
    model = reformer(axial_pos_shape=[2, 2])
    assert_model_equals_the_original(model, arguments, backend, train=True)


@backends
def test_chunks_of_different_lengths(backend):
    model = reformer(is_decoder=False, lsh_attn_chunk_length=8, local_num_chunks_after=1, num_buckets=None)
    for length in (3, 5, 8, 13, 33):
        arguments = dict(input_ids=ids(2, length), attention_mask=padding("right", 2, length))
        assert_model_equals_the_original(model, arguments, backend)


@backends
def test_bfloat16(backend):
    arguments = dict(input_ids=ids(3, 37), attention_mask=padding("left", 3, 37))
    assert_model_equals_the_original(reformer(), arguments, backend, dtype=torch.bfloat16)


def test_these_inputs_would_show_a_lost_mask_or_other_buckets():
    model, mask = reformer(), padding("left", 3, 40)
    with torch.no_grad():
        before = model(ids(3, 40), attention_mask=mask).logits
        shown = [model(ids(3, 40)).logits, model(ids(3, 40), attention_mask=mask, num_hashes=1).logits]
    for after in shown:
        assert (after - before)[mask.bool()].abs().max() > 0.1


HEADS = ["ReformerModel", "ReformerForSequenceClassification", "ReformerForQuestionAnswering"]


@pytest.mark.parametrize("cls", HEADS)
def test_every_head_class_of_the_family(cls):
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
def test_dropout_is_applied_in_training_and_not_in_eval(backend, kind):
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
def test_dropout_of_reversible_layers_is_the_same_on_the_way_back(backend):
    """Local layers use no other random numbers, so that forward and backward agree and inputs are reconstructed."""
    model = local(local_attention_probs_dropout_prob=0.3).train()
    seen = []
    attentions(model)[0].register_forward_hook(lambda module, args, output: seen.append(output.hidden_states.detach()))
    with attnzoo.patch(model, backend):
        model(ids(2, 64)).logits.square().sum().backward()
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-4)


def test_a_few_steps_of_training_follow_the_original():
    def losses(backend):
        model = reformer().train()
        if backend:
            attnzoo.patch(model, backend)
        optimiser, found = torch.optim.SGD(model.parameters(), lr=0.01), []
        for step in range(4):
            optimiser.zero_grad()
            loss = model(ids(2, 64, seed=step), labels=ids(2, 64, seed=step)).loss
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        return found

    original = losses(None)
    assert original[0] != original[-1]
    for backend in ("eager", "sdpa"):
        assert losses(backend) == pytest.approx(original, rel=1e-3)


# --- padding, attention weights


@backends
@pytest.mark.parametrize("kind", ["lsh", "local"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_rows_and_samples_are_zero_forward_and_backward(backend, kind, side):
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
def test_attention_weights_have_the_layout_of_the_original(is_decoder, length, around):
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
def test_attention_weights_are_those_after_dropout(is_decoder, kind, length):
    rate = dict(lsh_attention_probs_dropout_prob=0.5, local_attention_probs_dropout_prob=0.5)
    model = reformer(attn_layers=[kind], is_decoder=is_decoder, **rate)
    module, states = attentions(model)[0], hidden(2, length)
    asked = dict(buckets=module(states).buckets) if kind == "lsh" and length > CHUNK else {}
    with torch.no_grad(), attnzoo.patch(model, "eager"):
        kept = module(states, output_attentions=True, **asked).attention_probs
        model.train()
        dropped = module(states, output_attentions=True, **asked).attention_probs
    seen = kept > 1e-6
    seen &= seen.sum(-1, keepdim=True) > 2  # tokens that see only themselves, twice perhaps, are another matter
    gone = seen & (dropped == 0)
    assert 0.35 < gone.sum() / seen.sum() < 0.65
    torch.testing.assert_close(dropped[seen & ~gone], 2 * kept[seen & ~gone])


def test_attention_weights_are_empty_unless_asked_for_and_refused_by_fused_backends():
    model = reformer()
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        assert all(module(hidden(2, 16)).attention_probs == () for module in attentions(model))
        with pytest.raises(BackendRefusedError, match=r"eager"):
            model(ids(2, 16), output_attentions=True)


# --- what goes wrong


def test_a_length_that_is_no_multiple_of_the_chunk_is_refused():
    model = reformer(attn_layers=["local", "lsh"], num_hashes=1)
    with attnzoo.patch(model, "eager"):
        for module in attentions(model):
            with pytest.raises(InvalidArgumentError, match=r"hidden_states: got 9 tokens.*chunk length 4"):
                module(hidden(2, 9))


def test_bad_arguments_are_named():
    model = reformer(attn_layers=["local", "lsh"])
    mask = torch.ones(2, 8)
    with attnzoo.patch(model, "eager"):
        for module in attentions(model):
            with pytest.raises(InvalidArgumentError, match=r"attention_mask: got .* with NaN"):
                module(hidden(2, 8), attention_mask=mask.masked_fill(mask > 0, math.nan))
            with pytest.raises(InvalidArgumentError, match=r"attention_mask: got .*allowed: a tensor .2, 8. of bool"):
                module(hidden(2, 8), attention_mask=torch.ones(2, 7))
            with pytest.raises(InvalidArgumentError, match="position_bias"):
                module(hidden(2, 8), position_bias=torch.ones(1))
        with pytest.raises(InvalidArgumentError, match="buckets"):
            attentions(model)[1](hidden(2, 8), buckets=torch.zeros((2, 3, 2, 8), dtype=torch.long))


@pytest.mark.parametrize("hashes", [0, -1, 2.0, "2"])
@pytest.mark.parametrize("length", [3, 16])
def test_what_is_no_number_of_hashes_is_named(hashes, length):
    model = reformer()
    with attnzoo.patch(model, "sdpa"), pytest.raises(InvalidArgumentError, match=r"num_hashes: got .*integer >= 1"):
        model(ids(2, length), num_hashes=hashes)


def test_training_with_another_number_of_hashes_than_the_way_back_knows_is_named():
    model = reformer().train()
    with attnzoo.patch(model, "sdpa"):
        loss = model(ids(2, 64), num_hashes=3).logits.sum()
        with pytest.raises(InvalidArgumentError, match=r"buckets: got .2, 3, 3, 64.*allowed: .2, 3, 2, 64.: 2 hashes"):
            loss.backward()


def test_what_the_adapter_relies_on_is_what_it_was_verified_against():
    for point in REFORMER.points:
        assert drift(dict(point.verified)) == ()


# --- nothing is left behind


@pytest.mark.parametrize("hash_seed", [7, None])
def test_patching_explaining_and_removing_touch_neither_config_nor_random_stream(hash_seed):
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
def test_verifying_touches_neither_config_nor_random_stream(hash_seed):
    model = reformer(num_buckets=None, hash_seed=hash_seed)
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    inputs = dict(input_ids=ids(2, 32), attention_mask=padding("left", 2, 32))
    report = attnzoo.verify(model, inputs, "sdpa", gradients=False)
    assert all(site.ok for site in report.sites), str(report)
    assert len(report.sites) == 4
    assert model.config.to_dict() == config
    assert all(getattr(module, "num_buckets", None) is None for module in attentions(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_saving_while_patched(tmp_path):
    model = reformer(num_buckets=None)
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        expected = model(ids(2, 32)).logits
        model.save_pretrained(tmp_path)
    loaded = transformers.ReformerModelWithLMHead.from_pretrained(tmp_path)
    assert loaded.config.num_buckets is None
    with torch.no_grad(), attnzoo.patch(loaded.eval(), "sdpa"):
        torch.testing.assert_close(loaded(ids(2, 32)).logits, expected)


@pytest.mark.parametrize("changes", [{}, dict(hash_seed=None), dict(num_buckets=None), dict(is_decoder=False)], ids=str)
def test_verify_compares_runs_that_hash_alike(changes):
    model = reformer(**changes)
    before = model.config.to_dict()
    tokens = torch.randint(3, VOCAB, (2, 10 * CHUNK), generator=torch.Generator().manual_seed(0))
    report = attnzoo.verify(model, dict(input_ids=tokens), "sdpa")
    assert report.ok, str(report)
    (logits,) = report.end_to_end
    assert logits.error < 1e-4, "other rotations move logits by whole numbers"
    assert "training mode" in report.note and "training mode" in str(report)
    assert model.config.to_dict() == before
