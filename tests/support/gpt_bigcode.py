"""Tiny GPTBigCode models with spread weights, and a comparison of their outputs.

The reference is the original in float64 under sdpa, because its eager attention always computes the softmax in float32.
"""

import copy

import pytest
import torch

from attnzoo.conformance.error_rule import FORWARD, GRADIENT
from tests.support.compare import assert_obeys_the_error_rule
from tests.support.models import gpt_bigcode

WIDTH, HEADS = 32, 4
BACKENDS = ("eager", "sdpa")
KINDS = pytest.mark.parametrize("multi_query", [True, False], ids=["mqa", "mha"])
BOTH = pytest.mark.parametrize("backend", BACKENDS)


def build(implementation="sdpa", **changes):
    model = gpt_bigcode(**{"n_head": HEADS, "n_positions": 64, "eos_token_id": None, "pad_token_id": 0, **changes})
    model.set_attn_implementation(implementation)
    return model


def twin(model, implementation, dtype=torch.float32):
    """Return the original with the same weights in another dtype and under another implementation."""
    other = copy.deepcopy(model).to(dtype)
    other.set_attn_implementation(implementation)
    return other


def results(model, inputs, real=None, **more):
    """Return logits on real tokens, and the gradients of a random linear function of them."""
    real = inputs["attention_mask"].bool() if real is None else real
    model.zero_grad()
    logits = model(**inputs, **more).logits[real]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (logits * weights.to(logits.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def check(got, reference, baseline):
    assert got.keys() == reference.keys() == baseline.keys()
    for name in reference:
        k = FORWARD if name == "logits" else GRADIENT
        assert_obeys_the_error_rule(name, got[name], reference[name], baseline[name], k)
