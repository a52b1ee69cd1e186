"""Reformer patched equals Reformer: modules given their buckets, whole models, training, decoding.

Two things make Reformer hard to compare. Its hashes differ between float32 and float64, which draw other rotations from
the same seed: so modules are compared on given buckets, and models replay them (:func:`replayed`). And in float32 it
gets tokens that see only themselves wrong by some tenths of a percent, as it hides them with -1e5: so the original is
the judge in float64, where it is exact, and in float32 it only says how large an error may be.
"""

import copy
import math
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

import attnzoo
from attnzoo.adapters import reformer_local
from attnzoo.adapters.reformer import REFORMER
from attnzoo.adapters.reformer_lsh import HASHED_AT_ONCE
from attnzoo.error_rule import FORWARD, GRADIENT, check
from attnzoo.errors import BackendRefusedError, InvalidArgumentError
from attnzoo.fingerprint import drift

VOCAB, CHUNK = 99, 4
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
causal = pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "both ways"])
sides = pytest.mark.parametrize("side", ["none", "left", "right", "sample"])


def reformer(cls=None, **changes):
    """A tiny model on wide random weights, in eval mode."""
    base = dict(
        vocab_size=VOCAB, hidden_size=24, num_attention_heads=3, attention_head_size=8, feed_forward_size=32,
        attn_layers=["local", "lsh", "local", "lsh"], axial_pos_shape=[8, 8], axial_pos_embds_dim=[8, 16],
        lsh_attn_chunk_length=CHUNK, local_attn_chunk_length=CHUNK, lsh_num_chunks_before=1, lsh_num_chunks_after=0,
        local_num_chunks_before=1, local_num_chunks_after=0, num_hashes=2, num_buckets=4, is_decoder=True,
        max_position_embeddings=64, hidden_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0, pad_token_id=0, eos_token_id=2, hash_seed=7,
    )  # fmt: skip
    config = transformers.ReformerConfig(**{**base, **changes})
    ahead = config.lsh_num_chunks_after or config.local_num_chunks_after  # which the language model refuses
    decoder = "ReformerModel" if ahead else "ReformerModelWithLMHead"
    cls = cls or (decoder if config.is_decoder else "ReformerForMaskedLM")
    model, random = getattr(transformers, cls)(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                std = 1.0 if "embed" in name else 1.5 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.randn(parameter.shape, generator=random) * std)
    return model.eval()


def ids(*shape, seed=2):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padding(side, batch, length):
    """``(batch, length)`` ones with ragged padding on a side, or a ``"sample"`` that is nothing else; or None."""
    mask = torch.ones((batch, length), dtype=torch.long)
    for row in range(batch):
        cut = row * length // (batch + 1)
        if side == "left":
            mask[row, :cut] = 0
        elif side == "right":
            mask[row, length - cut :] = 0
    if side == "sample":
        mask[-1] = 0
    return None if side == "none" else mask


def attentions(model):
    """Its attention modules, bottom up."""
    return [layer.attention.self_attention for layer in model.base_model.encoder.layers]


# --- modules


def lsh(**changes):
    return attentions(reformer(attn_layers=["lsh"], **changes))[0]


def local(**changes):
    return reformer(attn_layers=["local"], **changes)


def hidden(batch, length, size=24, seed=3):
    return torch.randn((batch, length, size), generator=torch.Generator().manual_seed(seed))


def outcome(module, states, arguments, real, patch, dtype):
    """Output on real tokens, and gradients with respect to input and parameters of a loss on just that."""
    module = copy.deepcopy(module).to(dtype)
    states = states.to(dtype, copy=True).requires_grad_()
    # Only a whole model knows its family; an attention module that has no config is put into a container that has one.
    whole = torch.nn.Module()
    whole.module, whole.config = module, reformer().config
    handle = attnzoo.patch(whole, patch) if patch else None
    output = module(states, **arguments).hidden_states
    output = output if real is None else output[real.bool()]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (output * weights.to(dtype)).sum().backward()
    if handle is not None:
        assert all(site.calls == 1 for site in handle.sites)
    gradients = [states.grad, *(parameter.grad for parameter in module.parameters())]
    return {
        "output": output.detach(),
        "gradients": torch.cat([gradient.flatten() for gradient in gradients]),
    }


def assert_module_equals_the_original(module, states, mask, backend, **arguments):
    arguments["attention_mask"] = mask
    if not hasattr(module, "query"):
        arguments.setdefault("buckets", module(states, **arguments).buckets)

    def run(patch, dtype):
        return outcome(module, states, arguments, mask, patch, dtype)

    exact, oracle = run(None, torch.float64), run("eager", torch.float64)
    original, patched = run(None, torch.float32), run(backend, torch.float32)
    for name, k in (("output", FORWARD), ("gradients", GRADIENT)):
        torch.testing.assert_close(oracle[name], exact[name], rtol=1e-10, atol=1e-10)
        verdict = check(name, patched[name], oracle[name], original[name], k)
        assert verdict.ok, str(verdict)


@backends
@causal
@sides
@pytest.mark.parametrize("hashes", [1, 2, 4])
def test_lsh_given_its_buckets(is_decoder, backend, side, hashes):
    module = lsh(is_decoder=is_decoder, num_hashes=hashes, lsh_num_chunks_after=0 if is_decoder else 1)
    assert_module_equals_the_original(module, hidden(3, 24), padding(side, 3, 24), backend)


@backends
@causal
@pytest.mark.parametrize("buckets", [2, 8, [2, 4], [4, 2, 2], [4]], ids=str)
def test_lsh_by_number_of_buckets(is_decoder, backend, buckets):
    module = lsh(is_decoder=is_decoder, num_buckets=buckets)
    assert_module_equals_the_original(module, hidden(2, 32), padding("left", 2, 32), backend)


NEIGHBOURS = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 3), (5, 1), (0, 7)]


@backends
@causal
@pytest.mark.parametrize("around", NEIGHBOURS, ids=str)
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_lsh_counts_wrapped_neighbours_as_often_as_the_original(is_decoder, backend, around, chunks):
    before, after = around
    module = lsh(is_decoder=is_decoder, num_hashes=1, lsh_num_chunks_before=before, lsh_num_chunks_after=after)
    length = chunks * CHUNK
    assert_module_equals_the_original(module, hidden(2, length), padding("right", 2, length), backend)


@backends
@causal
def test_lsh_chunks_may_straddle_rounds(is_decoder, backend):
    module = lsh(is_decoder=is_decoder, num_hashes=4)
    assert_module_equals_the_original(module, hidden(2, 9), padding("left", 2, 9), backend)


@backends
@causal
@sides
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK])
def test_short_lsh_is_full_attention_without_oneself(is_decoder, backend, side, length):
    module = lsh(is_decoder=is_decoder)
    assert_module_equals_the_original(module, hidden(3, length), padding(side, 3, length), backend, buckets=None)


@backends
@causal
@sides
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, 2 * CHUNK, 7 * CHUNK])
def test_local(is_decoder, backend, side, length):
    module = attentions(local(is_decoder=is_decoder, local_num_chunks_after=0 if is_decoder else 1))[0]
    mask = padding(side, 3, length)
    if side == "sample":
        mask[-1, 0] = 1  # of a sample without any real token there is nothing to compare
    assert_module_equals_the_original(module, hidden(3, length), mask, backend)


@backends
@causal
@pytest.mark.parametrize("around", NEIGHBOURS, ids=str)
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_local_counts_wrapped_neighbours_as_often_as_the_original(is_decoder, backend, around, chunks):
    before, after = around
    module = attentions(local(is_decoder=is_decoder, local_num_chunks_before=before, local_num_chunks_after=after))[0]
    assert_module_equals_the_original(module, hidden(2, chunks * CHUNK), None, backend)


@backends
@causal
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("around", [(0, 0), (1, 0), (0, 1), (1, 1), (2, 3)], ids=str)
def test_long_local_inputs_go_by_slices_and_give_the_same(monkeypatch, is_decoder, backend, side, around):
    monkeypatch.setattr(reformer_local, "SLICE", 2 * CHUNK)
    monkeypatch.setattr(reformer_local, "SLICE_PER_NEIGHBOURHOOD", 1)
    before, after = around
    size = max(2, before + after) * CHUNK
    model = local(is_decoder=is_decoder, local_num_chunks_before=before, local_num_chunks_after=after).double()
    module, length = attentions(model)[0], 3 * size + CHUNK
    states, mask = hidden(3, length).double(), padding(side, 3, length)
    real = ... if mask is None else mask.bool()
    with torch.no_grad():
        expected = module(states, attention_mask=mask).hidden_states
        with attnzoo.patch(model, backend) as handle:
            got = module(states, attention_mask=mask).hidden_states
    torch.testing.assert_close(got[real], expected[real], rtol=1e-10, atol=1e-10)
    by_slices = not (is_decoder and after)  # the last chunk sees the first there
    assert handle.sites[0].calls == (4 if by_slices else 1)


def test_local_slices_only_where_nobody_can_tell():
    model = local(max_position_embeddings=8192)
    module, states = attentions(model)[0], hidden(1, 2 * reformer_local.SLICE)

    def calls(train=False, grad=False, backend="sdpa", **arguments):
        with torch.set_grad_enabled(grad), attnzoo.patch(model.train(train), backend) as handle:
            module(states[:, : arguments.pop("length", None)], **arguments)
        return handle.sites[0].calls

    assert calls() == 2
    assert calls(train=True) == calls(grad=True) == calls(length=2 * reformer_local.SLICE - CHUNK) == 1
    assert calls(backend="eager", output_attentions=True, length=8 * CHUNK) == 1


def test_local_projects_a_slice_at_a_time():
    model, length = local(max_position_embeddings=16384), 5 * reformer_local.SLICE
    sizes = []
    for projection in (attentions(model)[0].query, attentions(model)[0].key, attentions(model)[0].value):
        projection.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        attentions(model)[0](hidden(1, length))
    assert max(sizes) <= reformer_local.SLICE + CHUNK
    assert sum(sizes) <= 3 * (length + 5 * CHUNK)


@backends
@causal
def test_with_one_bucket_and_a_chunk_as_long_as_the_sequence_lsh_is_full_attention(is_decoder, backend):
    length = 16
    model = reformer(attn_layers=["lsh"], is_decoder=is_decoder, lsh_attn_chunk_length=8, num_hashes=1)
    module, states = attentions(model)[0], hidden(2, length)
    module.chunk_length, module.num_chunks_before = 8, 1  # both chunks: the whole sequence
    buckets = torch.zeros((2, 3, 1, length), dtype=torch.long)
    with torch.no_grad(), attnzoo.patch(model, backend):
        chunked = module(states, buckets=buckets).hidden_states
        module.chunk_length = length
        whole = module(states).hidden_states
    query = module.query_key(states).unflatten(-1, (3, 8)).transpose(1, 2)
    value = module.value(states).unflatten(-1, (3, 8)).transpose(1, 2)
    scores = query @ torch.nn.functional.normalize(query, dim=-1).transpose(-1, -2)
    hidden_keys = torch.eye(length).bool()
    if is_decoder:
        hidden_keys = torch.ones(length, length).triu().bool()
    weights = scores.masked_fill(hidden_keys, float("-inf")).softmax(-1)
    if is_decoder:
        weights[:, :, 0] = torch.eye(length)[0]
    expected = (weights @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked, expected, rtol=1e-4, atol=1e-4)


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


def assert_same_buckets_and_random_stream(module, states, mask):
    twin = copy.deepcopy(module)
    torch.manual_seed(5)
    expected, after = twin(states, attention_mask=mask).buckets, torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad(), attnzoo.patch(module, "sdpa"):
        got = module(states, attention_mask=mask).buckets
    assert torch.equal(got, expected)
    assert torch.equal(torch.rand(1), after)


SEEDS = [{}, {"num_buckets": [2, 4]}, {"num_buckets": None}, {"hash_seed": None}]
seeds = pytest.mark.parametrize("changes", SEEDS, ids=str)


@seeds
def test_the_same_rotations_and_buckets_as_the_original_for_a_seed(changes):
    assert_same_buckets_and_random_stream(lsh(**changes), hidden(2, 32), padding("left", 2, 32))


@seeds
@pytest.mark.parametrize("side", ["none", "left", "one token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_inputs_are_hashed_slice_by_slice_into_the_same_buckets(changes, side, dtype):
    length = 3 * HASHED_AT_ONCE + 64  # slices that differ by a token
    mask = padding(side, 2, length)
    if side == "one token":  # a padding bucket in the slices without padding, too
        mask[1, 5] = 0
    module = lsh(max_position_embeddings=length, lsh_attn_chunk_length=64, **changes).to(dtype)
    assert_same_buckets_and_random_stream(module, hidden(2, length).to(dtype), mask)


def test_no_tensor_of_all_rotated_queries_at_once():
    module, states = lsh(num_buckets=512), hidden(1, 4 * HASHED_AT_ONCE)
    sizes = []

    class Sizes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with torch.no_grad(), attnzoo.patch(module, "sdpa"), Sizes():
        module(states)
    rotated = 3 * 2 * states.shape[1] * 512  # heads, hashes, tokens, both directions of all rotations
    assert max(sizes) <= rotated // 4


@pytest.mark.parametrize("lengths", [(16, 32), (32, 16), (8,), (64,)], ids=str)
@pytest.mark.parametrize("positions", [64, 4096])
def test_num_buckets_is_derived_like_the_original_from_the_first_input(lengths, positions):
    changes = dict(num_buckets=None, max_position_embeddings=positions, lsh_attn_chunk_length=1)
    original, patched = lsh(**changes), lsh(**changes)
    kept = copy.deepcopy(vars(patched.config))
    with attnzoo.patch(patched, "sdpa"), torch.no_grad():
        for length in lengths:
            assert torch.equal(patched(hidden(2, length)).buckets, original(hidden(2, length)).buckets)
    assert original.num_buckets is not None
    assert patched.num_buckets is None
    assert vars(patched.config) == kept


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
            with pytest.raises(InvalidArgumentError, match=r"attention_mask: got .*allowed: .2, 8."):
                module(hidden(2, 8), attention_mask=torch.ones(2, 7))
            with pytest.raises(InvalidArgumentError, match="position_bias"):
                module(hidden(2, 8), position_bias=torch.ones(1))
        with pytest.raises(InvalidArgumentError, match="buckets"):
            attentions(model)[1](hidden(2, 8), buckets=torch.zeros((2, 3, 2, 8), dtype=torch.long))


def test_what_the_adapter_relies_on_is_what_it_was_verified_against():
    for seam in REFORMER.seams:
        assert drift(dict(seam.verified)) == ()


# --- models


@contextmanager
def replayed(model, record):
    """Record the buckets of every LSH attention, or hash like the recording, in any dtype."""
    recording, handles = not record, []
    for number, module in enumerate(attentions(model)):
        if hasattr(module, "query"):
            continue

        def keep(module, args, kwargs, output, number=number):
            if kwargs.get("buckets") is None and output.buckets is not None:
                record[number].append(output.buckets)

        def give(module, args, kwargs, number=number, turn=iter(tuple(record[number]))):  # noqa: B008
            if kwargs.get("buckets") is None and kwargs["hidden_states"].shape[1] > module.chunk_length:
                kwargs["buckets"] = next(turn)
            return args, kwargs

        if recording:
            handles.append(module.register_forward_hook(keep, with_kwargs=True))
        else:
            handles.append(module.register_forward_pre_hook(give, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def whole(model, arguments, patch, dtype, record, train):
    """Logits on real tokens and, when training, the gradient of all parameters."""
    model = copy.deepcopy(model).to(dtype).train(train)
    handle = attnzoo.patch(model, patch) if patch else None
    with replayed(model, record), torch.set_grad_enabled(train):
        logits = model(**arguments).logits
        mask = arguments["attention_mask"]
        found = {"logits": logits.detach() if mask is None else logits.detach()[mask.bool()]}
        if train:
            loss = logits.double().square()
            (loss if mask is None else loss * mask[..., None]).sum().backward()
            grads = {name: parameter.grad for name, parameter in model.named_parameters()}
            assert [name for name, grad in grads.items() if grad is None] == ["lm_head.bias"]  # it is not used
            found["gradients"] = torch.cat([grad.flatten() for grad in grads.values() if grad is not None])
    if handle is not None:
        assert all(site.calls == 1 + train for site in handle.sites)
    return found


def assert_model_equals_the_original(model, arguments, backend, train=False, dtype=torch.float32):
    record = defaultdict(list)
    original = whole(model, arguments, None, dtype, record, train)
    exact = whole(model, arguments, None, torch.float64, record, train)
    oracle = whole(model, arguments, "eager", torch.float64, record, train)
    patched = whole(model, arguments, backend, dtype, record, train)
    for name, k in (("logits", FORWARD), ("gradients", GRADIENT)):
        if name in exact:
            torch.testing.assert_close(oracle[name], exact[name], rtol=1e-9, atol=1e-9)
            verdict = check(name, patched[name], oracle[name], original[name], k, dtype)
            assert verdict.ok, str(verdict)


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


# --- decoding


@backends
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("prompt", [1, CHUNK - 1, CHUNK, CHUNK + 1, 11])
@pytest.mark.parametrize("layers", [["local"], ["lsh"], ["local", "lsh"]], ids="+".join)
def test_greedy_generation_gives_the_tokens_of_the_original(backend, use_cache, prompt, layers):
    model = reformer(attn_layers=layers * 2, num_hashes=2)
    arguments = dict(max_new_tokens=14, min_new_tokens=14, do_sample=False, use_cache=use_cache)
    expected = model.generate(ids(1, prompt), **arguments)
    with attnzoo.patch(model, backend) as handle:
        got = model.generate(ids(1, prompt), **arguments)
    assert torch.equal(got, expected)
    assert all(site.calls == 14 for site in handle.sites)


@backends
def test_beams_give_the_tokens_of_the_original(backend):
    model = reformer()
    arguments = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, num_beams=4)
    expected = model.generate(ids(2, 9), **arguments)
    with attnzoo.patch(model, backend):
        assert torch.equal(model.generate(ids(2, 9), **arguments), expected)


@backends
@pytest.mark.parametrize("prompt", [CHUNK - 1, 10])
def test_logits_of_cached_decoding(backend, prompt):
    """Logits, step by step: tokens would hide an error. Two samples: the original mixes them up, and so do we."""
    model = reformer(num_buckets=[2, 2], num_hashes=3).double()

    def decode():
        with torch.no_grad():
            returned = model(ids(2, prompt), use_cache=True)
            found = [returned.logits[:, -1]]
            for step in range(9):
                token, past = ids(2, 1, seed=step), returned.past_buckets_states
                mask = torch.ones(2, 1) if step % 2 else None
                returned = model(token, past_buckets_states=past, use_cache=True, attention_mask=mask)
                found.append(returned.logits[:, -1])
        return torch.stack(found)

    expected = decode()
    with attnzoo.patch(model, backend):
        torch.testing.assert_close(decode(), expected, rtol=1e-9, atol=1e-9)


@backends
def test_a_mask_of_the_new_token_alone_may_hide_it(backend):
    model, mask = local(), torch.tensor([[1], [0]])

    def decode():
        with torch.no_grad():
            past = model(ids(2, 9), use_cache=True).past_buckets_states
            return model(ids(2, 1), past_buckets_states=past, use_cache=True, attention_mask=mask).logits

    expected = decode()
    with attnzoo.patch(model, backend):
        got = decode()
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", ["lsh", "local"])
def test_several_tokens_on_a_filled_cache_are_refused(kind):
    model = reformer(attn_layers=[kind])
    with torch.no_grad(), attnzoo.patch(model, "eager"):
        past = model(ids(1, 9), use_cache=True).past_buckets_states
        with pytest.raises(InvalidArgumentError, match="hidden_states: got 2 tokens on a filled cache"):
            model(ids(1, 2), past_buckets_states=past, use_cache=True)


def test_decoding_from_a_short_prompt_derives_a_number_of_buckets_where_the_original_fails():
    model = reformer(num_buckets=None)
    arguments = dict(max_new_tokens=9, min_new_tokens=9, do_sample=False, use_cache=True)
    with pytest.raises(TypeError):
        copy.deepcopy(model).generate(ids(1, 3), **arguments)
    with attnzoo.patch(model, "sdpa"):
        assert model.generate(ids(1, 3), **arguments).shape == (1, 12)
    assert model.config.num_buckets is None


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_generation_without_a_number_of_buckets_gives_the_tokens_of_the_original(use_cache):
    model = reformer(num_buckets=None)
    arguments = dict(max_new_tokens=14, min_new_tokens=14, do_sample=False, use_cache=use_cache)
    expected = copy.deepcopy(model).generate(ids(1, 9), **arguments)
    with attnzoo.patch(model, "sdpa"):
        assert torch.equal(model.generate(ids(1, 9), **arguments), expected)
    assert model.config.num_buckets is None
    assert all(module.num_buckets is None for module in attentions(model) if not hasattr(module, "query"))


# --- attention weights


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


@pytest.mark.parametrize("prompt", [3, 9])
def test_attention_weights_of_cached_decoding(prompt):
    model = reformer().double()

    def decode():
        with torch.no_grad():
            past = model(ids(1, prompt), use_cache=True).past_buckets_states
            return model(ids(1, 1), past_buckets_states=past, use_cache=True, output_attentions=True).attentions

    expected = decode()
    with attnzoo.patch(model, "eager"):
        for ours, theirs in zip(decode(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_attention_weights_are_empty_unless_asked_for_and_refused_by_fused_backends():
    model = reformer()
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        assert all(module(hidden(2, 16)).attention_probs == () for module in attentions(model))
        with pytest.raises(BackendRefusedError, match=r"eager"):
            model(ids(2, 16), output_attentions=True)


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
