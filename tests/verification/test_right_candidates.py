"""``verify`` accepts right candidates whose roundings differ from those of the model's own code."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.conformance.recomputed import recomputed
from tests.plugin.attnzoo_example_plugin.tiled import TiledBackend
from tests.support.models import gpt_neox, ids, led, led_inputs, longt5, longt5_inputs

PLAIN = replace(EagerBackend.capabilities, probabilities=False, dropout=False)


@dataclass(frozen=True)
class OtherOrder(attnzoo.Backend):
    """Sums keys and components of heads in another order, and computes the scores again in the backward."""

    name: ClassVar[str] = "other-order"
    capabilities: ClassVar[attnzoo.Capabilities] = PLAIN

    def run(self, attention, probabilities=False):
        return attnzoo.Result(recomputed(attention, order=3), "other-order")


@dataclass(frozen=True)
class WideSums(attnzoo.Backend):
    """Computes in float32 or float64, and rounds only the output, as kernels for half precision do."""

    name: ClassVar[str] = "wide-sums"
    capabilities: ClassVar[attnzoo.Capabilities] = PLAIN

    def run(self, attention, probabilities=False):
        dtype = torch.promote_types(attention.query.dtype, torch.float32)
        result = EagerBackend().run(attention.with_tensors(tuple(tensor.to(dtype) for tensor in attention.tensors())))
        return result._replace(output=result.output.to(attention.query.dtype))


RIGHT = {
    "eager": EagerBackend(),
    "sdpa": SdpaBackend(),
    "another order of summation": OtherOrder(),
    "float32 sums": WideSums(),
    "tiles with a running softmax": TiledBackend(tile=8),
}
MODELS = {
    "gpt_neox": (gpt_neox, lambda: dict(input_ids=ids(2, 21))),
    "led": (led, lambda: led_inputs(21, "left", batch=2)),
    "longt5": (lambda: longt5(num_layers=1, num_decoder_layers=1), lambda: longt5_inputs(21, "left", batch=2)),
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
@pytest.mark.parametrize("backend", RIGHT.values(), ids=RIGHT)
def test_right_candidate_is_accepted(backend, dtype):
    build, inputs = MODELS["gpt_neox"]
    report = attnzoo.verify(build().to(dtype), inputs(), backend)
    assert report.ok, str(report)


@pytest.mark.parametrize("family", ["led", "longt5"])
@pytest.mark.parametrize("backend", list(RIGHT.values())[2:], ids=list(RIGHT)[2:])
def test_right_candidate_is_accepted_with_padding_bias_and_two_segments(backend, family):
    build, inputs = MODELS[family]
    report = attnzoo.verify(build(), inputs(), backend)
    assert report.ok, str(report)


def test_right_candidate_is_accepted_in_fast_mode():
    build, inputs = MODELS["led"]
    assert attnzoo.verify(build(), inputs(), TiledBackend(tile=8), fast=True).ok
