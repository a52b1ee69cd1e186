"""torchao's int8 weights in patched models: the linear layers are quantised, attention computes on their outputs."""

from __future__ import annotations

import warnings

import pytest
import torch

from attnzoo.conformance.error_rule import FORWARD
from tests.support.judge import logits_of
from tests.support.models import FAMILIES, llama
from tests.support.programs import assert_runs_as_unpatched

with warnings.catch_warnings():  # torchao warns about its compiled parts for GPUs
    warnings.simplefilter("ignore")
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install attnzoo[tools]")

BUILDS = {name: FAMILIES[name].build for name in ("led", "longformer", "longt5-local", "gpt_neox", "gpt_bigcode-mqa")}
BUILDS["llama"] = llama


@pytest.mark.parametrize("first", ["patch", "quantise"])
@pytest.mark.parametrize("name", BUILDS)
def test_int8_weights_compute_as_without_a_patch(name, first):
    """All runs quantise the same float32 weights, and the oracle computes with the quantised values in float64."""
    inputs = FAMILIES["gpt_neox" if name == "llama" else name].inputs(21, "right")
    config = quantization.Int8WeightOnlyConfig(version=2)

    def program(model, patch):
        dtype = next(model.parameters()).dtype
        model = model.float()
        if first == "patch":
            patch(model)
        quantization.quantize_(model, config)
        if first == "quantise":
            patch(model)
        if dtype == torch.float64:
            dequantise(model)
        with torch.no_grad():
            return {"logits": logits_of(model, inputs)}

    calls = {"led": {"LEDEncoderSelfAttention": 2, "LEDDecoderAttention": 1}, "longformer": 2}.get(name, 1)
    assert_runs_as_unpatched(BUILDS[name], program, calls, k=FORWARD)


def dequantise(model):
    """Replace the quantised weights by their values in float64."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    quantised = [layer for layer in layers if type(layer.weight.data) is not torch.Tensor]
    assert quantised, "no layer was quantised"
    for layer in quantised:
        layer.weight = torch.nn.Parameter(layer.weight.dequantize().double(), requires_grad=False)
    model.double()
