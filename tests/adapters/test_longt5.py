"""LongT5 patched equals LongT5: every mode of its encoder and decoder, on weights that would show a difference."""

import copy
import dataclasses
import math

import pytest
import torch
import transformers

import attnzoo
from attnzoo.adapters.longt5 import LONGT5, _aggregate, _globals
from attnzoo.backends.eager import EagerBackend
from attnzoo.error_rule import FORWARD, GRADIENT, check
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, PatchError
from attnzoo.fingerprint import drift

RADIUS, BLOCK, VOCAB = 7, 4, 99
TABLES = "relative_attention_bias"
kinds = pytest.mark.parametrize("kind", ["local", "transient-global"])
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def spread(model):
    """Wide random weights. T5 does not scale its scores, so its queries are narrower by the root of the head's size."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                wide = any(word in name for word in ("shared", "embed", TABLES))
                std = 1.0 if wide else 1.5 / math.sqrt(parameter.shape[1])
                std *= model.config.d_kv**-0.5 if name.endswith(".q.weight") else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=random) * std)
    return model.eval()


def longt5(kind="local", cls="LongT5ForConditionalGeneration", **changes):
    base = dict(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=3, num_decoder_layers=2,
        local_radius=RADIUS, global_block_size=BLOCK, relative_attention_num_buckets=8, dropout_rate=0.0,
        relative_attention_max_distance=16, encoder_attention_type=kind, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.LongT5Config(**{**base, **changes})))


def padding(batch, length, side):
    """``(batch, length)`` ones, but ragged padding on a side, or a ``"sample"`` that is nothing but padding."""
    mask = torch.ones((batch, length), dtype=torch.long)
    for row in range(batch):
        cut = row * length // (batch + 1)
        if side == "left":
            mask[row, :cut] = 0
        elif side == "right":
            mask[row, length - cut :] = 0
    if side == "holes":
        mask[1:, length // 3 : length // 3 + 5] = 0
    if side == "sample":
        mask[-1] = 0
    return mask


def encoder_inputs(length, side="left", batch=3):
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (batch, length), generator=random)
    return dict(input_ids=ids, attention_mask=padding(batch, length, side))


def inputs(length, side="left", batch=3):
    random = torch.Generator().manual_seed(3)
    return dict(
        **encoder_inputs(length, side, batch),
        decoder_input_ids=torch.randint(3, VOCAB, (batch, 9), generator=random),
        decoder_attention_mask=padding(batch, 9, "right"),
        use_cache=False,
    )


def outcome(model, arguments, patch=None, dtype=torch.float32, prepare=lambda model: None):
    """What a model returns on real tokens of samples that have any, and the gradients of a loss on just that."""
    model = copy.deepcopy(model).to(dtype)
    prepare(model)
    handle = attnzoo.patch(model, patch) if patch else None
    returned = model(**arguments)
    mask = arguments["attention_mask"]
    states = returned.encoder_last_hidden_state if "logits" in returned else returned.last_hidden_state
    found = {"encoder": states[mask.bool()]}
    if "logits" in returned:
        real = arguments["decoder_attention_mask"] * mask.any(1, keepdim=True)
        found["logits"] = returned.logits[real.bool()]
    sum(part.double().square().sum() for part in found.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found["gradients"] = torch.cat([gradient.flatten() for gradient in gradients.values()])
    tables = [gradient.flatten() for name, gradient in gradients.items() if TABLES in name]
    if tables:
        found["gradients of the tables"] = torch.cat(tables)
    if handle is not None:
        assert all(site.calls for site in handle.sites), handle
    return found, set(gradients)


def assert_equal_to_the_original(model, arguments, patch, dtype=torch.float32, prepare=lambda model: None):
    reference, _ = outcome(model, arguments, None, torch.float64, prepare)
    original, trained = outcome(model, arguments, None, dtype, prepare)
    patched, trained_too = outcome(model, arguments, patch, dtype, prepare)
    assert trained_too == trained
    for name, expected in reference.items():
        k = FORWARD if name in ("encoder", "logits") else GRADIENT
        verdict = check(name, patched[name], expected, original[name], k, dtype)
        assert verdict.ok, str(verdict)
    return patched


@kinds
@backends
@pytest.mark.parametrize("side", ["none", "left", "right", "sample", "holes"])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, RADIUS, RADIUS + 1, RADIUS + 2, 3 * RADIUS + 5, 100])
def test_logits_and_gradients(kind, backend, side, length):
    assert_equal_to_the_original(longt5(kind), inputs(length, side), backend)


@pytest.mark.parametrize("block", [3, 5, 16])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_blocks_of_any_size(block, side):
    assert_equal_to_the_original(longt5("transient-global", global_block_size=block), inputs(61, side, 4), "sdpa")


@kinds
def test_these_inputs_would_show_a_lost_mask_or_bias(kind):
    model, arguments = longt5(kind), inputs(37)
    with torch.no_grad():
        before = model(**arguments).logits
        shown = [model(**{**arguments, "attention_mask": torch.ones(3, 37)}).logits]
        for name, parameter in model.named_parameters():
            if TABLES in name:
                kept = parameter.clone()
                parameter.zero_()
                shown.append(model(**arguments).logits)
                parameter.copy_(kept)
    assert len(shown) == (3 if kind == "local" else 4)
    for after in shown:
        assert (after - before)[arguments["decoder_attention_mask"].bool()].abs().max() > 0.1


@kinds
@backends
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "checkpointed-reentrant"])
def test_training(kind, backend, reentrant):
    def prepare(model):
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    assert_equal_to_the_original(longt5(kind), inputs(37), backend, prepare=prepare)


@kinds
@backends
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_bias_tables_learn_when_all_else_is_frozen(kind, backend, checkpointed):
    def prepare(model):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(TABLES in name)

    found = assert_equal_to_the_original(longt5(kind), inputs(37), backend, prepare=prepare)
    tables = found["gradients"].view(-1, 8, 4)
    assert len(tables) == (2 if kind == "local" else 3)
    assert all(table.abs().max() > 0.01 for table in tables)


@kinds
@backends
def test_frozen_tables(kind, backend):
    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(TABLES not in name)

    assert_equal_to_the_original(longt5(kind), inputs(37), backend, prepare=freeze)


@kinds
@backends
@pytest.mark.parametrize("side", ["left", "right"])
def test_bfloat16(kind, backend, side):
    assert_equal_to_the_original(longt5(kind), inputs(37, side), backend, torch.bfloat16)


@kinds
@backends
def test_autocast(kind, backend):
    model, arguments = longt5(kind), inputs(37)
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(**arguments).logits
        with torch.autocast("cpu", torch.bfloat16):
            original = model(**arguments).logits
            with attnzoo.patch(model, backend):
                patched = model(**arguments).logits
    real = arguments["decoder_attention_mask"].bool()
    verdict = check("logits", patched[real], reference[real], original[real], FORWARD, torch.bfloat16)
    assert verdict.ok, str(verdict)


@kinds
@backends
def test_gated_feed_forward_and_untied_weights(kind, backend):
    model = longt5(kind, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    assert_equal_to_the_original(model, inputs(37), backend)


@kinds
@backends
@pytest.mark.parametrize("length", [1, 8, 37])
def test_encoder_alone(kind, backend, length):
    assert_equal_to_the_original(longt5(kind, "LongT5EncoderModel"), encoder_inputs(length), backend)


@kinds
def test_without_a_mask(kind):
    arguments = inputs(37, "none")
    model = longt5(kind)
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        expected = model(**arguments).logits
        del arguments["attention_mask"]
        assert torch.equal(model(**arguments).logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
@backends
def test_masks_of_either_implementation_of_the_decoder(implementation, padded, backend):
    model, arguments = longt5(), inputs(37)
    if not padded:  # for sdpa the model then builds no mask at all
        del arguments["decoder_attention_mask"]
    with torch.no_grad():
        expected = model(**arguments).logits
        for part in (model, model.encoder, model.decoder):
            part.config._attn_implementation = implementation
        with attnzoo.patch(model, backend):
            got = model(**arguments).logits
    real = arguments.get("decoder_attention_mask", torch.ones(3, 9)).bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-4)


def test_blocks_are_summed_in_float32():
    states = torch.randn(2, 200, 5).bfloat16()
    blocks = _globals(padding(2, 200, "left"), 64)
    exact = [[states[b, blocks.of[b] == g].double().sum(0) for g in range(3)] for b in range(2)]
    exact = torch.stack([torch.stack(sample) for sample in exact])
    torch.testing.assert_close(_aggregate(states, blocks).double(), exact, rtol=torch.finfo(states.dtype).eps, atol=0)


MIXTURES = {
    "the first layer": {"encoder.block.0*": "sdpa", "decoder.block.0*": "sdpa"},
    "a later layer": {"encoder.block.1*": "sdpa", "decoder.block.1*": "sdpa"},
    "all but the first": {"*.block.0.*": "native", "*": "sdpa"},
    "several backends": {"*.block.1.*": "eager", "*": "sdpa"},
    "only cross": {"*EncDecAttention": "sdpa"},
}


@kinds
@pytest.mark.parametrize("patch", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("length", [3, 37])
def test_patched_and_unpatched_layers_share_the_bias(kind, patch, length):
    assert_equal_to_the_original(longt5(kind), inputs(length), patch)


@kinds
@pytest.mark.parametrize("layer", [0, 1])
def test_a_later_patch_that_runs_a_layers_own_code(kind, layer):
    model, arguments = longt5(kind), inputs(37)
    real = arguments["decoder_attention_mask"].bool()
    with torch.no_grad():
        expected = model(**arguments).logits
        with attnzoo.patch(model, "sdpa"), attnzoo.patch(model, {f"*.block.{layer}.*": "native"}):
            got = model(**arguments).logits
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-4)


@kinds
def test_a_part_of_a_stack(kind):
    model, arguments = longt5(kind), inputs(37)
    real = arguments["decoder_attention_mask"].bool()
    with torch.no_grad():
        expected = model(**arguments).logits
        for part in (model.encoder, model.decoder, model.decoder.block[0], model.decoder.block[1]):
            with attnzoo.patch(part, "sdpa"):
                got = model(**arguments).logits
            torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-4)


@kinds
@pytest.mark.parametrize("frozen", ["encoder.block.0", "encoder.block.1", "relative_attention_bias"])
def test_layers_that_fall_back_share_the_bias_with_those_that_do_not(kind, frozen):
    """A backend without gradients: layers before the first that trains run on it, the others fall back."""

    class Forwards(EagerBackend):
        name = "forwards"
        capabilities = dataclasses.replace(EagerBackend.capabilities, grad=False, bias_grad=False)

    def prepare(model):
        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (name.startswith("shared") or frozen in name))

    model, arguments = longt5(kind, tie_word_embeddings=False), inputs(37)
    reference, _ = outcome(model, arguments, None, torch.float64, prepare)
    original, _ = outcome(model, arguments, None, torch.float32, prepare)
    attnzoo.register_backend(Forwards)
    try:
        prepare(model)
        with attnzoo.patch(model, "forwards", fallback="native") as handle:
            patched, _ = outcome(model, arguments)
    finally:
        attnzoo.unregister_backend("forwards")
    assert handle.sites
    for name, expected in reference.items():
        verdict = check(name, patched[name], expected, original[name], GRADIENT)
        assert verdict.ok, str(verdict)


@kinds
@backends
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copied"])
def test_the_bias_is_made_once_per_forward_and_is_no_larger_than_its_distances(kind, backend, copied):
    model, arguments = longt5(kind), inputs(100)
    looked_up, passed = [], []
    for name, module in model.named_modules():
        if name.endswith(TABLES):
            module.register_forward_hook(lambda module, given, made: looked_up.append(made.numel()))
        if name.endswith(("SelfAttention", "EncDecAttention")) and "layer" in name:
            module.register_forward_hook(lambda module, given, made: passed.append(made[1]))
    with torch.no_grad(), attnzoo.patch(model, backend):
        (copy.deepcopy(model) if copied else model)(**arguments)
    assert len(looked_up) == (2 if kind == "local" else 3)
    sizes = [value.numel() for value in passed if value is not None]
    assert len(sizes) >= 5
    assert max(looked_up + sizes) <= 4 * (2 * RADIUS + 1 + 2 * 16 + 1)


@kinds
def test_a_deep_copy_of_a_layer_is_of_that_layer_alone(kind):
    model, arguments = longt5(kind), inputs(37)
    real = arguments["decoder_attention_mask"].bool()
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        expected = model(**arguments).logits
        for stack in (model.encoder, model.decoder):
            first, others, copied = stack.block[0], stack.block[1:], {}
            stack.block[0] = copy.deepcopy(first, copied)
            assert not any(id(module) in copied for module in others.modules())
            torch.testing.assert_close(model(**arguments).logits[real], expected[real], rtol=1e-5, atol=1e-4)
            attnzoo.unpatch(stack.block[0])
            torch.testing.assert_close(model(**arguments).logits[real], expected[real], rtol=1e-5, atol=1e-4)


@kinds
@backends
@pytest.mark.parametrize("side", ["left", "right", "sample"])
def test_padding_rows_are_zero(kind, backend, side):
    model, arguments = longt5(kind, "LongT5EncoderModel"), encoder_inputs(37, side)
    outputs = []
    for module in model.modules():
        if type(module).__name__ in ("LongT5LocalAttention", "LongT5TransientGlobalAttention"):
            module.register_forward_hook(lambda module, given, made: outputs.append(made[0]))
    with torch.no_grad(), attnzoo.patch(model, backend):
        model(**arguments)
    assert len(outputs) == 3
    real = arguments["attention_mask"].bool()
    assert all(not output[~real].any() and output[real].all() for output in outputs)


@kinds
@backends
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("search", [dict(), dict(num_beams=4)], ids=["greedy", "beam 4"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(kind, backend, side, search, cache):
    model = longt5(kind)
    given = dict(**encoder_inputs(37, side), **search, cache_implementation=cache, do_sample=False)
    extra = dict(max_new_tokens=24, no_repeat_ngram_size=2)
    expected = model.generate(**given, **extra)
    with attnzoo.patch(model, backend) as handle:
        assert torch.equal(model.generate(**given, **extra), expected)
        uncached = model.generate(**{**given, "cache_implementation": None}, **extra, use_cache=False)
    assert torch.equal(uncached, expected)
    assert len(expected.unique()) > 3
    assert all(site.calls for site in handle.sites)


@backends
@pytest.mark.parametrize("patch", [None, {"decoder.block.1*": "sdpa"}], ids=["whole", "mixed"])
def test_generation_far_beyond_the_largest_bucket(backend, patch):
    model, given = longt5(relative_attention_max_distance=6), encoder_inputs(20)
    extra = dict(max_new_tokens=40, min_new_tokens=40, no_repeat_ngram_size=2, do_sample=False)
    expected = model.generate(**given, **extra)
    with attnzoo.patch(model, patch or backend):
        assert torch.equal(model.generate(**given, **extra), expected)


@kinds
def test_attention_probabilities(kind):
    model, arguments = longt5(kind), inputs(37, "left")
    real = arguments["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**arguments, output_attentions=True)
        with attnzoo.patch(model, "sdpa"), pytest.raises(BackendRefusedError, match='backend="eager"'):
            model(**arguments, output_attentions=True)
        with attnzoo.patch(model, "eager"):
            got = model(**arguments, output_attentions=True)
    for theirs, ours in zip(expected.encoder_attentions, got.encoder_attentions, strict=True):
        assert ours.shape == theirs.shape  # (batch, blocks, heads, rows of a block, columns)
        theirs, ours = (weights.transpose(2, 3).flatten(1, 2)[:, :37][real] for weights in (theirs, ours))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name in ("decoder_attentions", "cross_attentions"):
        for theirs, ours in zip(getattr(expected, name), getattr(got, name), strict=True):
            keep = arguments["decoder_attention_mask"].bool()
            theirs, ours = (weights.transpose(1, 2)[keep] for weights in (theirs, ours))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@kinds
def test_dropout_is_the_models(kind):
    model, arguments = longt5(kind, dropout_rate=0.3), inputs(37)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # what is left is the dropout of attention weights
    for part in (model.encoder, model.decoder):
        with attnzoo.patch(part, "eager"), torch.no_grad():
            model.eval()
            assert torch.equal(model(**arguments).logits, model(**arguments).logits)
            part.train()
            assert not torch.equal(model(**arguments).logits, model(**arguments).logits)


@kinds
def test_saving_and_removing_leave_no_trace(kind, tmp_path):
    model, arguments = longt5(kind), inputs(37)
    with torch.no_grad():
        expected = model(**arguments).logits
    keys, config = list(model.state_dict()), model.config.to_dict()
    handle = attnzoo.patch(model, "sdpa")
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    twin = copy.deepcopy(model)
    handle.remove()
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(**arguments).logits, expected)
        assert torch.equal(loaded(**arguments).logits, expected)
        real = arguments["decoder_attention_mask"].bool()
        torch.testing.assert_close(twin(**arguments).logits[real], expected[real], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "mask", "message"),
    [
        ("local", None, "mask"),
        ("local", torch.ones(1, 1, 2, 8, 24), "as the model's stack makes it"),
        ("local", torch.ones(1, 1, 2, 8, 24, dtype=torch.bool), "not made of padding"),
        ("transient-global", None, "mask"),
        ("transient-global", torch.full((1, 16), 0.5), "ones"),
        ("transient-global", torch.full((1, 16), math.nan), "ones"),
        ("transient-global", torch.ones(1, 15), "ones"),
    ],
)
def test_masks_no_stack_makes_are_refused(kind, mask, message):
    model = longt5(kind, "LongT5EncoderModel")
    module = next(model.encoder.block[0].layer[0].children())
    with attnzoo.patch(model, "eager"), pytest.raises(InvalidArgumentError, match=message):
        module(torch.randn(1, 16, 32), mask=mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(local_radius=0), "local_radius"),
        (dict(relative_attention_num_buckets=64), "relative_attention_num_buckets"),
    ],
)
@kinds
def test_configurations_it_cannot_serve_are_refused_at_patch_time(kind, changes, message):
    model = longt5(kind, "LongT5EncoderModel", **changes)
    with pytest.raises(PatchError, match=message):
        attnzoo.patch(model, "sdpa")


def test_everything_it_relies_on_is_what_it_was_verified_against():
    for seam in LONGT5.seams:
        assert drift(dict(seam.verified)) == ()
