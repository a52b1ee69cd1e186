"""Attention probabilities under ``eager`` lie on the way to the output where the original's do: they get gradients."""

import pytest
import torch

import attnzoo
from tests.support.models import FAMILIES, gpt_bigcode, ids

KINDS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


def gradients(model, inputs):
    """The gradient each returned attention tensor gets, by its name (None: it is not on the way); and who sees whom."""
    returned = model(**inputs, output_attentions=True)
    found = {f"{kind} {n}": one for kind in KINDS for n, one in enumerate(getattr(returned, kind, None) or ())}
    for one in found.values():
        if one.requires_grad:
            one.retain_grad()
    returned[0].square().mean().backward()
    return {name: one.grad for name, one in found.items()}, {name: one.detach() > 0 for name, one in found.items()}


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_probabilities_get_the_gradients_of_the_original(family, training, side):
    if family.name == "reformer" and not training:
        pytest.skip("the original's backward works in training mode only")
    model, inputs = family.build().double().train(training), family.inputs(21 if "longt5" in family.name else 24, side)
    if family.name not in ("reformer", "led", "longformer"):
        model.set_attn_implementation("eager")
    expected, seen = gradients(model, inputs)
    with attnzoo.patch(model, "eager"):
        found, _ = gradients(model, inputs)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        if gradient is not None:
            assert found[name] is not None, f"{name} has no gradient"
            real = real_rows(name, gradient, inputs) * seen[name]
            off = ((found[name] - gradient) * real).abs().max()
            assert off <= 1e-5 * gradient.abs().max(), name  # models take their softmax in float32, in float64 too


def real_rows(name, gradient, inputs):
    """1 in rows of real tokens: what the original leaves in padding rows is not compared."""
    decoder = "decoder_attention_mask" in inputs and not name.startswith("encoder")
    mask = inputs["decoder_attention_mask" if decoder else "attention_mask"].to(gradient.dtype)
    if gradient.ndim == 4:
        return mask[:, None, :, None]
    block = gradient.shape[3]
    return torch.nn.functional.pad(mask, (0, -mask.shape[1] % block)).unflatten(1, (-1, block))[:, :, None, :, None]


def test_cross_attention_of_gpt_bigcode():
    """Broken in the original: the gradient is that of the definition, the change of the loss with the weights."""
    model = gpt_bigcode(add_cross_attention=True, multi_query=False).double()
    states = torch.randn(2, 6, 32, dtype=torch.float64)
    with attnzoo.patch(model, "eager"):
        found, _ = gradients(model, dict(input_ids=ids(2, 5), encoder_hidden_states=states))
    assert sorted(found) == ["attentions 0", "attentions 1", "cross_attentions 0", "cross_attentions 1"]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
