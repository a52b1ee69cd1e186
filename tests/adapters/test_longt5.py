"""A patched LongT5 equals the original in every mode of its encoder and decoder."""

import copy
import inspect
import math

import pytest
import torch
from transformers import DynamicCache
from transformers.models.longt5 import modeling_longt5

import attnzoo
from attnzoo.adapters.longt5_blocks import find_global_blocks, read_blocked_mask, sum_blocks
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, PatchError
from tests.support.longt5 import (
    BLOCK,
    RADIUS,
    TABLES,
    assert_equal_to_the_original,
    backends,
    encoder_inputs,
    inputs,
    kinds,
    longt5,
    padding,
)
from tests.support.models import ids

NAME = list(inspect.signature(modeling_longt5.LongT5Attention.forward).parameters)[5]  # "past_key_values" or "cache"


@kinds
@backends
@pytest.mark.parametrize("side", ["left", "right", "sample", "holes"])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, RADIUS + 1, 3 * RADIUS + 5])
def test_states_logits_and_gradients_equal_the_original(kind, backend, side, length):
    assert_equal_to_the_original(longt5(kind), inputs(length, side), backend)


@pytest.mark.parametrize("block", [3, 5, 16])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_global_block_sizes_equal_the_original(block, side):
    assert_equal_to_the_original(longt5("transient-global", global_block_size=block), inputs(61, side, 4), "sdpa")


def test_a_positional_cache_is_read_like_a_keyword():
    """Releases of transformers name this argument differently, but keep its place."""
    model = longt5().eval()
    attention, states = model.decoder.block[0].layer[0].SelfAttention, torch.randn(1, 2, model.config.d_model)

    def cache():
        filled, random = DynamicCache(), torch.Generator().manual_seed(1)
        key, value = torch.randn((2, 1, attention.n_heads, 3, attention.key_value_proj_dim), generator=random)
        filled.update(key, value, attention.layer_idx)
        return filled

    with torch.no_grad():
        expected = attention(states, None, None, None, cache())[0]
        with attnzoo.patch(model, "sdpa"):
            by_place, by_name = attention(states, None, None, None, cache())[0], attention(states, **{NAME: cache()})[0]
    torch.testing.assert_close(by_place, expected)
    assert torch.equal(by_place, by_name)


@kinds
def test_inputs_reveal_a_lost_mask_or_bias(kind):
    model, arguments = longt5(kind), inputs(37)
    with torch.no_grad():
        before = model(**arguments).logits
        changed = [model(**{**arguments, "attention_mask": torch.ones(3, 37)}).logits]
        for name, parameter in model.named_parameters():
            if TABLES in name:
                saved = parameter.clone()
                parameter.zero_()
                changed.append(model(**arguments).logits)
                parameter.copy_(saved)
    assert len(changed) == (3 if kind == "local" else 4)
    for after in changed:
        assert (after - before)[arguments["decoder_attention_mask"].bool()].abs().max() > 0.1


@kinds
@backends
def test_reentrant_checkpointing_equals_the_original(kind, backend):
    def prepare(model):
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})

    assert_equal_to_the_original(longt5(kind), inputs(37), backend, prepare=prepare)


@kinds
@backends
@pytest.mark.parametrize("checkpointed", [False, True])
def test_bias_tables_train_when_all_other_weights_are_frozen(kind, backend, checkpointed):
    def prepare(model):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(TABLES in name)

    results = assert_equal_to_the_original(longt5(kind), inputs(37), backend, prepare=prepare)
    tables = results["gradients"].view(-1, 8, 4)
    assert len(tables) == (2 if kind == "local" else 3)
    assert all(table.abs().max() > 0.01 for table in tables)


@kinds
@backends
def test_frozen_bias_tables_equal_the_original(kind, backend):
    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(TABLES not in name)

    assert_equal_to_the_original(longt5(kind), inputs(37), backend, prepare=freeze)


@kinds
@backends
def test_gated_feed_forward_and_untied_weights_equal_the_original(kind, backend):
    model = longt5(kind, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    assert_equal_to_the_original(model, inputs(37), backend)


@kinds
@backends
@pytest.mark.parametrize("length", [1, 8, 37])
def test_encoder_without_decoder_equals_the_original(kind, backend, length):
    assert_equal_to_the_original(longt5(kind, "LongT5EncoderModel"), encoder_inputs(length), backend)


@kinds
def test_missing_mask_equals_a_mask_of_ones(kind):
    arguments = inputs(37, "none")
    model = longt5(kind)
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        expected = model(**arguments).logits
        del arguments["attention_mask"]
        assert torch.equal(model(**arguments).logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
@backends
def test_decoder_reads_the_masks_of_eager_and_sdpa(implementation, padded, backend):
    model, arguments = longt5(), inputs(37)
    if not padded:  # without padding the model builds no mask for sdpa
        del arguments["decoder_attention_mask"]
    with torch.no_grad():
        expected = model(**arguments).logits
        for part in (model, model.encoder, model.decoder):
            part.config._attn_implementation = implementation
        with attnzoo.patch(model, backend):
            got = model(**arguments).logits
    real = arguments.get("decoder_attention_mask", torch.ones(3, 9)).bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@backends
def test_cross_attention_without_a_mask_sees_all_tokens_of_the_encoder(implementation, backend):
    """For sdpa, a missing mask means causal in self-attention only."""
    decoder = longt5().decoder
    decoder.config._attn_implementation = implementation
    given = dict(input_ids=ids(2, 6, seed=3), encoder_hidden_states=torch.randn(2, 6, 32))
    with torch.no_grad():
        expected = decoder(**given).last_hidden_state
        with attnzoo.patch(decoder, backend):
            got = decoder(**given).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_blocks_are_summed_in_float32():
    states = torch.randn(2, 200, 5).bfloat16()
    blocks = find_global_blocks(padding(2, 200, "left"), 64)
    exact = [[states[b, blocks.block_of[b] == g].double().sum(0) for g in range(3)] for b in range(2)]
    exact = torch.stack([torch.stack(sample) for sample in exact])
    torch.testing.assert_close(sum_blocks(states, blocks).double(), exact, rtol=torch.finfo(states.dtype).eps, atol=0)


@pytest.mark.parametrize("side", ["none", "left", "right", "sample", "holes"])
@pytest.mark.parametrize("size", [1, 4, 25, 64])
def test_blocks_are_numbered_by_position_in_any_default_dtype(size, side):
    """The original gives the same block numbers if its sums are exact, which holds for powers of two."""
    mask = padding(3, 700, side)
    torch.set_default_dtype(torch.bfloat16)
    try:
        blocks = find_global_blocks(mask, size)
    finally:
        torch.set_default_dtype(torch.float32)
    for sample, row in enumerate(mask.tolist()):
        full = sum(bool(row[end]) for end in range(size - 1, 700, size))
        assert blocks.block_of[sample].tolist() == [
            min(position // size, full - 1) if real else -1 for position, real in enumerate(row)
        ]
    assert blocks.number == 700 // size
    if size != 25:
        block_of, exists = modeling_longt5._make_global_fixed_block_ids(mask, size)
        assert torch.equal(blocks.block_of, block_of.long()) and torch.equal(blocks.exists, exists.bool())


@kinds
@backends
@pytest.mark.parametrize("side", ["left", "right", "sample"])
def test_padding_rows_are_zero(kind, backend, side):
    model, arguments = longt5(kind, "LongT5EncoderModel"), encoder_inputs(37, side)
    outputs = []
    for module in model.modules():
        if type(module).__name__ in ("LongT5LocalAttention", "LongT5TransientGlobalAttention"):
            module.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad(), attnzoo.patch(model, backend):
        model(**arguments)
    assert len(outputs) == 3
    real = arguments["attention_mask"].bool()
    assert all(not output[~real].any() and output[real].all() for output in outputs)


@backends
@pytest.mark.parametrize("patch", [None, {"decoder.block.1*": "sdpa"}], ids=["whole", "mixed"])
def test_generation_beyond_the_largest_bucket_returns_the_original_tokens(backend, patch):
    model, given = longt5(relative_attention_max_distance=6), encoder_inputs(20)
    extra = dict(max_new_tokens=40, min_new_tokens=40, no_repeat_ngram_size=2, do_sample=False)
    expected = model.generate(**given, **extra)
    with attnzoo.patch(model, patch or backend):
        assert torch.equal(model.generate(**given, **extra), expected)


@backends
def test_encoders_with_different_block_sizes_share_one_mask(backend):
    encoders = torch.nn.ModuleList(
        longt5("transient-global", "LongT5EncoderModel", global_block_size=size) for size in (BLOCK, 2 * BLOCK)
    )
    arguments = encoder_inputs(37)
    real = arguments["attention_mask"].bool()
    with torch.no_grad():
        expected = [encoder(**arguments).last_hidden_state[real] for encoder in encoders]
        with attnzoo.patch(encoders, backend):
            got = [encoder(**arguments).last_hidden_state[real] for encoder in encoders]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_unsigned_masks_are_refused(dtype):
    """The original gives padding the block -1. In an unsigned byte, -1 is 255, so padding would belong to a block."""
    model, given = longt5("transient-global", "LongT5EncoderModel"), encoder_inputs(37, "left")
    given["attention_mask"] = given["attention_mask"].to(dtype)
    with (
        attnzoo.patch(model, "sdpa"),
        pytest.raises(attnzoo.InvalidArgumentError, match=r"attention_mask: got .*; allowed: .*signed dtype"),
    ):
        model(**given)


@kinds
def test_attention_probabilities_equal_the_original(kind):
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
def test_dropout_applies_to_attention_weights_in_training_only(kind):
    model, arguments = longt5(kind, dropout_rate=0.3), inputs(37)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # only the dropout of attention weights remains
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
        ("local", torch.ones(1, 1, 2, 8, 24), "the mask from LongT5Stack"),
        ("local", torch.ones(1, 1, 2, 8, 24, dtype=torch.bool), "not a window mask combined with a padding mask"),
        ("transient-global", None, "mask"),
        ("transient-global", torch.full((1, 16), 0.5), "1 for tokens"),
        ("transient-global", torch.full((1, 16), math.nan), "1 for tokens"),
        ("transient-global", torch.ones(1, 15), "1 for tokens"),
    ],
)
def test_masks_that_no_stack_makes_are_refused(kind, mask, message):
    model = longt5(kind, "LongT5EncoderModel")
    module = next(model.encoder.block[0].layer[0].children())
    with attnzoo.patch(model, "eager"), pytest.raises(InvalidArgumentError, match=message):
        module(torch.randn(1, 16, 32), mask=mask)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_one_wrong_entry_of_a_local_mask_is_found(blocks, padded):
    length = blocks * BLOCK
    real = torch.ones(2, length)
    real[1, length - padded :] = 0
    mask = modeling_longt5._get_local_attention_mask(real, BLOCK, "cpu")
    states = torch.randn(2, length, 8)
    assert torch.equal(read_blocked_mask(mask, BLOCK, states).real, real.bool())
    # The entries on the diagonal show which tokens are real.
    entries = [(b, n, row, key) for b in (0, 1) for n in range(blocks) for row in (0, 3) for key in (0, 2, 5, 11)]
    for entry in (entry for entry in entries if entry[3] != entry[2] + BLOCK):
        wrong = mask.clone()
        wrong[entry[0], 0, entry[1], entry[2], entry[3]] ^= True
        with pytest.raises(InvalidArgumentError, match="not a window mask combined with a padding mask"):
            read_blocked_mask(wrong, BLOCK, states)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(local_radius=0), "local_radius"),
        (dict(relative_attention_num_buckets=64), "relative_attention_num_buckets"),
    ],
)
@kinds
def test_unsupported_configurations_are_refused_at_patch_time(kind, changes, message):
    model = longt5(kind, "LongT5EncoderModel", **changes)
    with pytest.raises(PatchError, match=message):
        attnzoo.patch(model, "sdpa")


BUCKETS = [
    # Half of the buckets of a direction serve single distances: a quarter of all in the encoder, half in the decoder.
    ("LongT5EncoderModel", 8, 3, True),
    ("LongT5EncoderModel", 8, 2, False),
    ("LongT5EncoderModel", 4, 2, True),
    ("LongT5EncoderModel", 3, 16, False),
    ("LongT5Model", 8, 5, True),
    ("LongT5Model", 8, 4, False),
]


@pytest.mark.parametrize(("cls", "buckets", "distance", "works"), BUCKETS)
@kinds
def test_smallest_distance_of_the_buckets_is_the_first_that_is_accepted(kind, cls, buckets, distance, works):
    sizes = dict(relative_attention_num_buckets=buckets, relative_attention_max_distance=distance)
    model = longt5(kind, cls, **sizes)
    if not works:
        with pytest.raises(PatchError, match=f"relative_attention_num_buckets={buckets}, .*_max_distance={distance}"):
            attnzoo.patch(model, "sdpa")
        return
    arguments = encoder_inputs(60) if cls == "LongT5EncoderModel" else inputs(60)
    mask = arguments.get("decoder_attention_mask", arguments["attention_mask"]).bool()
    with torch.no_grad():
        expected = model(**arguments)[0][mask]
        with attnzoo.patch(model, "sdpa"):
            got = model(**arguments)[0][mask]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
