"""Tiny LongT5 models, their inputs, and a comparison of a patched model with the original."""

import copy

import pytest
import torch

import attnzoo
from tests.support import models as zoo
from tests.support.compare import assert_obeys_the_error_rule

RADIUS, BLOCK = 7, 4
TABLES = "relative_attention_bias"
kinds = pytest.mark.parametrize("kind", ["local", "transient-global"])
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def longt5(kind="local", cls="LongT5ForConditionalGeneration", **changes):
    return zoo.longt5(cls, kind, **{"num_heads": 4, "num_layers": 3, **changes})


def padding(batch, length, side):
    """Return the padding mask of a side; ``"holes"`` is padding within samples."""
    mask = zoo.padded(batch, length, side)
    if side == "holes":
        mask[1:, length // 3 : length // 3 + 5] = 0
    return mask


def encoder_inputs(length, side="left", batch=3):
    return dict(input_ids=zoo.ids(batch, length), attention_mask=padding(batch, length, side))


def inputs(length, side="left", batch=3):
    return dict(
        **encoder_inputs(length, side, batch),
        decoder_input_ids=zoo.ids(batch, 9, seed=3),
        decoder_attention_mask=padding(batch, 9, "right"),
        use_cache=False,
    )


def outcome(model, arguments, patch=None, dtype=torch.float32, prepare=lambda model: None):
    """Return outputs on real tokens of a copy of the model, gradients of a loss, and the names of the gradients."""
    model = copy.deepcopy(model).to(dtype)
    prepare(model)
    handle = attnzoo.patch(model, patch) if patch else None
    returned = model(**arguments)
    mask = arguments["attention_mask"]
    states = returned.encoder_last_hidden_state if "logits" in returned else returned.last_hidden_state
    results = {"encoder": states[mask.bool()]}
    if "logits" in returned:
        real = arguments["decoder_attention_mask"] * mask.any(1, keepdim=True)
        results["logits"] = returned.logits[real.bool()]
    sum(part.double().square().sum() for part in results.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    results["gradients"] = torch.cat([gradient.flatten() for gradient in gradients.values()])
    tables = [gradient.flatten() for name, gradient in gradients.items() if TABLES in name]
    if tables:
        results["gradients of the tables"] = torch.cat(tables)
    if handle is not None:
        assert all(site.calls for site in handle.sites), handle
    return results, set(gradients)


def assert_equal_to_the_original(model, arguments, patch, prepare=lambda model: None):
    reference, _ = outcome(model, arguments, None, torch.float64, prepare)
    original, trained = outcome(model, arguments, None, torch.float32, prepare)
    patched, trained_too = outcome(model, arguments, patch, torch.float32, prepare)
    assert trained_too == trained
    for name, expected in reference.items():
        assert_obeys_the_error_rule(name, patched[name], expected, original[name])
    return patched
