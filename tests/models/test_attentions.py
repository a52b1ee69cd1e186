"""Attention probabilities under ``eager`` get the same gradients as those of the original."""

import pytest
import torch

import attnzoo
from tests.support.models import FAMILIES, gpt_bigcode, ids

KINDS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


def weights_of(returned):
    """The attention weights in the output of a model, by name. A layer of Pegasus-X returns two tensors in a dict."""
    layers = {f"{kind} {n}": layer for kind in KINDS for n, layer in enumerate(getattr(returned, kind, None) or ())}
    return {
        " ".join((name, *part)): tensor
        for name, layer in layers.items()
        for part, tensor in ({(key,): layer[key] for key in layer} if isinstance(layer, dict) else {(): layer}).items()
    }


def gradients(model, inputs):
    """Return by name the gradient of each attention tensor (None: no path to the output), and where it is positive."""
    returned = model(**inputs, output_attentions=True)
    tensors = weights_of(returned)
    for tensor in tensors.values():
        if tensor.requires_grad:
            tensor.retain_grad()
    returned[0].square().mean().backward()
    return {name: t.grad for name, t in tensors.items()}, {name: t.detach() > 0 for name, t in tensors.items()}


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_probabilities_have_the_gradients_of_the_original(family, training, side):
    if family.name == "reformer" and not training:
        pytest.skip("the original's backward works in training mode only")
    model, inputs = family.build().double().train(training), family.inputs(21 if "longt5" in family.name else 24, side)
    if family.name not in ("reformer", "led", "longformer"):
        model.set_attn_implementation("eager")
    expected, positive = gradients(model, inputs)
    with attnzoo.patch(model, "eager"):
        patched, _ = gradients(model, inputs)
    assert patched.keys() == expected.keys() and patched
    for name, gradient in expected.items():
        if gradient is not None:
            assert patched[name] is not None, f"{name} has no gradient"
            compared = real_rows(name, gradient, inputs) * positive[name]
            difference = ((patched[name] - gradient) * compared).abs().max()
            assert difference <= 1e-5 * gradient.abs().max(), name  # float64 models, too, use a float32 softmax


def real_rows(name, gradient, inputs):
    """Return 1 for rows of real tokens, else 0: padding rows of the original have arbitrary values."""
    decoder = "decoder_attention_mask" in inputs and not name.startswith("encoder")
    mask = inputs["decoder_attention_mask" if decoder else "attention_mask"].to(gradient.dtype)
    if name.endswith("global"):
        return torch.ones(())  # the queries are global tokens, which are never padding
    if gradient.ndim == 4:
        return mask[:, None, :, None]
    block = gradient.shape[3]
    if name.endswith("local"):  # with heads before blocks; in every second layer, half a block of padding on each side
        blocks = gradient.shape[2]
        missing = blocks * block - mask.shape[1]
        before = block // 2 if missing >= block else 0
        return torch.nn.functional.pad(mask, (before, missing - before)).view(-1, 1, blocks, block, 1)
    return torch.nn.functional.pad(mask, (0, -mask.shape[1] % block)).unflatten(1, (-1, block))[:, :, None, :, None]


def test_probabilities_of_gpt_bigcode_cross_attention_get_gradients():
    """The original's code raises or is wrong, so there is no reference."""
    model = gpt_bigcode(add_cross_attention=True, multi_query=False).double()
    states = torch.randn(2, 6, 32, dtype=torch.float64)
    with attnzoo.patch(model, "eager"):
        patched, _ = gradients(model, dict(input_ids=ids(2, 5), encoder_hidden_states=states))
    assert sorted(patched) == ["attentions 0", "attentions 1", "cross_attentions 0", "cross_attentions 1"]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in patched.values())
