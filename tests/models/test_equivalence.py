"""Patched models equal the originals on real tokens, forward and backward."""

import pytest
import torch

import attnzoo
from attnzoo.patching.replay import replaying
from tests.support.compare import assert_obeys_the_error_rule
from tests.support.judge import hashes_of, judge, logits_of
from tests.support.models import (
    FAMILIES,
    bigbird,
    bigbird_pegasus,
    causal_inputs,
    gpt_bigcode,
    gpt_neox,
    led,
    led_inputs,
    longformer,
    longformer_inputs,
    longt5,
    longt5_inputs,
    pegasus_x,
)

BACKENDS = ["eager", "sdpa"]
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
backends = pytest.mark.parametrize("backend", BACKENDS)
sides = pytest.mark.parametrize("side", ["none", "left", "right", "sample"])


@families
@backends
@sides
def test_logits_and_gradients_pass_the_error_rule(family, backend, side):
    report = attnzoo.verify(family.build(), family.inputs(37, side), backend)
    assert report.ok, str(report)


def lengths(family):
    """Lengths around the block size, where models pad and blocks are partial."""
    return 1, family.block - 1, family.block, family.block + 1, 3 * family.block + 2


def modes(family):
    return "eval", "train", *(["checkpointed"] if family.build().supports_gradient_checkpointing else [])


@pytest.mark.parametrize(("family", "length"), [(f, n) for f in FAMILIES.values() for n in lengths(f)], ids=str)
def test_logits_and_gradients_without_padding_at_every_length(family, length):
    report = attnzoo.verify(family.build(), family.inputs(length, "none"), "sdpa")
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("family", "mode", "length"),
    [(f, mode, n) for f in FAMILIES.values() for mode in modes(f) for n in lengths(f)],
    ids=str,
)
def test_logits_and_gradients_at_every_length_in_every_mode(family, mode, length):
    judge(family, family.inputs(length, "every"), mode)


@families
def test_training_on_more_rows_than_one_internal_block(family):
    judge(family, family.inputs(family.long, "every"), "train")


@pytest.mark.parametrize(("family", "mode"), [(f, mode) for f in FAMILIES.values() for mode in modes(f)], ids=str)
def test_bfloat16_logits_and_gradients_in_every_mode(family, mode):
    judge(family, family.inputs(4 * family.block, "every"), mode, torch.bfloat16)


@backends
@sides
@pytest.mark.parametrize("globals_", ["zero", "one", "varying", "all"])
@pytest.mark.parametrize("build", [led, longformer])
def test_global_tokens_pass_the_error_rule(build, globals_, side, backend):
    inputs = (led_inputs if build is led else longformer_inputs)(37, side, globals_)
    report = attnzoo.verify(build(), inputs, backend)
    assert report.ok, str(report)


@families
@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_pass_the_error_rule(family, backend, dtype):
    report = attnzoo.verify(family.build().to(dtype), family.inputs(37, "left"), backend)
    assert report.ok, str(report)


@backends
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [gpt_neox, gpt_bigcode])
def test_4d_mask_with_one_row_hides_its_keys_from_all_queries(build, implementation, backend):
    """Like the original, a patch uses the row for all queries, and adds no causality."""
    model, inputs = build(), causal_inputs(11, "left")
    model.set_attn_implementation(implementation)
    real = inputs["attention_mask"].bool()
    hidden = torch.zeros(real.shape).masked_fill(~real, torch.finfo(torch.float32).min)
    changed = dict(inputs, attention_mask=hidden[:, None, None], position_ids=torch.arange(11)[None])
    with torch.no_grad():
        before = model(**changed).logits
        with attnzoo.patch(model, backend):
            after = model(**changed).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * before.abs().max().item())


@families
@backends
def test_logits_equal_the_originals_to_1e_5_of_their_size(family, backend):
    model, inputs = family.build(), family.inputs(37, "left")
    model = model.double() if family.coarse else model
    with torch.no_grad():
        before = logits_of(model, inputs)
        with attnzoo.patch(model, backend):
            after = logits_of(model, inputs)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * before.abs().max().item())


MASKS = ["attention_mask", "global_attention_mask", "decoder_attention_mask"]


@pytest.mark.parametrize(
    ("family", "mask"),
    [(family, mask) for family in FAMILIES.values() for mask in MASKS if mask in family.inputs(37, "left")],
    ids=str,
)
def test_inputs_show_a_lost_mask(family, mask):
    model, inputs = family.build(), family.inputs(37, "left")
    changed = dict(inputs)
    changed[mask] = torch.zeros_like(inputs[mask]) if "global" in mask else torch.ones_like(inputs[mask])
    real = inputs["decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"].bool()
    with torch.no_grad():
        difference = (model(**inputs).logits - model(**changed).logits)[real].abs().max()
    if mask == "decoder_attention_mask":
        assert difference < 1e-4  # no real token of a causal decoder sees padding on its right
    else:
        assert difference > 0.1


@families
@backends
def test_autocast_computes_in_the_autocast_dtype(family, backend):
    model, inputs = family.build(), family.inputs(37, "left")
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fails = family.name == "bigbird"  # its original scatters bfloat16 into float32, and raises
            with hashes_of(model) as buckets, attnzoo.patch(model, "eager" if fails else "native"):
                original = logits_of(model, inputs).float()
            with replaying(model, buckets), attnzoo.patch(model, backend) as handle:
                dtypes = []
                for site in handle.sites:
                    site.observer = lambda site, attention, result, backend: dtypes.append(result.output.dtype)
                got = logits_of(model, inputs).float()
        with replaying(model, buckets), attnzoo.patch(model, "eager"):
            reference = logits_of(model.double(), inputs)
    assert set(dtypes) == {torch.bfloat16}
    assert_obeys_the_error_rule("logits", got, reference, original, dtype=torch.bfloat16)


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.dropouts], ids=str)
@backends
def test_dropout_is_applied_in_training_and_not_in_eval(family, backend):
    model, inputs = family.build(**dict.fromkeys(family.dropouts, 0.5)), family.inputs(36, "none")
    with attnzoo.patch(model, backend), torch.no_grad():
        assert torch.equal(logits_of(model, inputs), logits_of(model, inputs))
        model.train()
        assert not torch.allclose(logits_of(model, inputs), logits_of(model, inputs), atol=1e-2)


CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
HEADS = [
    *((led, f"LED{head}", led_inputs) for head in ("Model", "ForQuestionAnswering")),
    *((longformer, f"Longformer{head}", longformer_inputs) for head in ("Model", *CLASSIFIERS)),
    (longt5, "LongT5Model", longt5_inputs),
    (longt5, "LongT5EncoderModel", causal_inputs),
    (pegasus_x, "PegasusXModel", longt5_inputs),
    *((bigbird, f"BigBird{head}", causal_inputs) for head in ("Model", *CLASSIFIERS[:2])),
    *((bigbird_pegasus, f"BigBirdPegasus{head}", longt5_inputs) for head in ("Model", "ForQuestionAnswering")),
    *((gpt_neox, f"GPTNeoX{head}", causal_inputs) for head in ("Model", *CLASSIFIERS)),
    *((gpt_bigcode, f"GPTBigCode{head}", causal_inputs) for head in ("Model", *CLASSIFIERS[:2])),
]


@pytest.mark.parametrize(("build", "cls", "inputs"), HEADS, ids=[cls for _, cls, _ in HEADS])
def test_every_head_class_passes_the_error_rule(build, cls, inputs):
    report = attnzoo.verify(build(cls), inputs(26, "right"), "sdpa")
    assert report.ok, str(report)
