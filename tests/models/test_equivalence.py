"""Whole models: patched equals original, on real tokens, forward and backward."""

import pytest
import torch

import attnzoo
from attnzoo.error_rule import FORWARD, GRADIENT, check

from .zoo import FAMILIES, causal_inputs, gpt_neox, led, led_inputs, longformer, longformer_inputs

BACKENDS = ["eager", "sdpa"]
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
backends = pytest.mark.parametrize("backend", BACKENDS)
sides = pytest.mark.parametrize("side", ["none", "left", "right", "sample"])


def outputs(model, inputs):
    """Logits (or the first output) on real tokens."""
    returned = model(**inputs)
    logits = returned.logits if hasattr(returned, "logits") else returned[0]
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    mask = inputs.get(name)
    return logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:2] else logits


@families
@backends
@sides
def test_logits_and_gradients_are_within_the_error_rule(family, backend, side):
    report = attnzoo.verify(family.build(), family.inputs(37, side), backend)
    assert report.ok, str(report)


@families
@backends
@pytest.mark.parametrize("length", [1, 7, 8, 9, 26, 300])
def test_any_length(family, backend, length):
    report = attnzoo.verify(family.build(), family.inputs(length, "left" if length > 3 else "none"), backend)
    assert report.ok, str(report)


@backends
@sides
@pytest.mark.parametrize("globals_", ["zero", "one", "varying", "all"])
@pytest.mark.parametrize("build", [led, longformer])
def test_global_tokens(build, globals_, side, backend):
    inputs = (led_inputs if build is led else longformer_inputs)(37, side, globals_)
    report = attnzoo.verify(build(), inputs, backend)
    assert report.ok, str(report)


@families
@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(family, backend, dtype):
    report = attnzoo.verify(family.build().to(dtype), family.inputs(37, "left"), backend)
    assert report.ok, str(report)


@families
@backends
def test_logits_equal_the_original_to_1e_5_of_their_size(family, backend):
    model, inputs = family.build(), family.inputs(37, "left")
    with torch.no_grad():
        before = outputs(model, inputs)
        with attnzoo.patch(model, backend):
            after = outputs(model, inputs)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * before.abs().max().item())


MASKS = ["attention_mask", "global_attention_mask", "decoder_attention_mask"]


@pytest.mark.parametrize(
    ("family", "mask"),
    [(family, mask) for family in FAMILIES.values() for mask in MASKS if mask in family.inputs(37, "left")],
    ids=str,
)
def test_these_inputs_would_show_a_lost_mask(family, mask):
    model, inputs = family.build(), family.inputs(37, "left")
    changed = dict(inputs)
    changed[mask] = torch.zeros_like(inputs[mask]) if "global" in mask else torch.ones_like(inputs[mask])
    real = inputs["decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"].bool()
    with torch.no_grad():
        difference = (model(**inputs).logits - model(**changed).logits)[real].abs().max()
    if mask == "decoder_attention_mask":
        assert difference < 1e-4  # padding on the right of a causal decoder: nothing real looks at it
    else:
        assert difference > 0.1


@families
@backends
def test_training_with_gradient_checkpointing_gives_the_same_gradients(family, backend):
    inputs = family.inputs(37, "left")

    def gradients(patched, dtype):
        model = family.build().to(dtype).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if patched:
            handle = attnzoo.patch(model, patched)
        outputs(model, inputs).square().sum().backward()
        if patched:
            assert all(site.calls for site in handle.sites)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    verdict = check(
        "gradient",
        gradients(backend, torch.float32),
        gradients("eager", torch.float64),
        gradients(None, torch.float32),
        GRADIENT,
    )
    assert verdict.ok, str(verdict)


@families
@backends
def test_autocast_computes_in_the_autocast_dtype(family, backend):
    model, inputs = family.build(), family.inputs(37, "left")
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            original = outputs(model, inputs).float()
            with attnzoo.patch(model, backend) as handle:
                seen = []
                for site in handle.sites:
                    site.observer = lambda site, attention, result, ran: seen.append(result.output.dtype)
                got = outputs(model, inputs).float()
        with attnzoo.patch(model, "eager"):
            reference = outputs(model.double(), inputs)
    assert set(seen) == {torch.bfloat16}
    verdict = check("logits", got, reference, original, FORWARD, dtype=torch.bfloat16)
    assert verdict.ok, str(verdict)


@families
@backends
def test_dropout_is_applied_in_training_and_not_in_eval(family, backend):
    dropout = dict(attention_dropout=0.5, attention_probs_dropout_prob=0.5)
    config_keys = set(family.build().config.to_dict())
    model = family.build(**{key: value for key, value in dropout.items() if key in config_keys})
    inputs = family.inputs(37, "none")
    with attnzoo.patch(model, backend), torch.no_grad():
        assert torch.equal(outputs(model, inputs), outputs(model, inputs))
        model.train()
        assert not torch.allclose(outputs(model, inputs), outputs(model, inputs), atol=1e-2)


HEADS = [
    *[(led, f"LED{head}", led_inputs) for head in ("Model", "ForQuestionAnswering")],
    *[
        (longformer, f"Longformer{head}", longformer_inputs)
        for head in ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    ],
    *[
        (gpt_neox, f"GPTNeoX{head}", causal_inputs)
        for head in ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    ],
]


@pytest.mark.parametrize(("build", "cls", "inputs"), HEADS, ids=[cls for _, cls, _ in HEADS])
def test_every_head_class_of_the_family(build, cls, inputs):
    report = attnzoo.verify(build(cls), inputs(26, "right"), "sdpa")
    assert report.ok, str(report)
