"""torch.ao's quantize_dynamic on patched models: packed int8 layers take the place of the linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnzoo
from tests.support.models import FAMILIES, llama

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch.ao.*")
BUILDS = {name: FAMILIES[name].build for name in ("led", "longformer", "longt5-local", "gpt_neox")} | {"llama": llama}


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("first", ["patch", "quantise"])
@pytest.mark.parametrize("name", BUILDS)
def test_packed_layers_compute_as_without_a_patch(name, first):
    """A packed layer rounds its inputs to 8 bits. A difference of 5e-7 between two steps becomes one step.

    The scale of this rounding comes from all rows of a tensor. Rows of padding tokens differ between the original and a
    patch, so these inputs have no padding.
    """
    inputs = FAMILIES["gpt_neox" if name == "llama" else name].inputs(21, "none")
    with torch.no_grad():
        expected = quantised(BUILDS[name]())(**inputs).logits
        plain = BUILDS[name]()(**inputs).logits
        model = BUILDS[name]()
        if first == "patch":
            attnzoo.patch(model, "sdpa")
        model = quantised(model)  # copies the model
        handle = attnzoo.handle(model) if first == "patch" else attnzoo.patch(model, "sdpa")
        got = model(**inputs).logits
    assert all(site.calls for site in handle.sites)
    steps = (expected - plain).abs().max()
    assert (got - expected).abs().max() < 0.5 * steps, "less than what the 8 bits have changed"
