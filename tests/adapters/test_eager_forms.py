"""Every eager attention function in the table computes what its form says."""

import pytest
import torch
from torch import nn

from attnzoo.adapters.eager_forms import FORMS
from attnzoo.adapters.generic import AnyInterfaceAttention
from attnzoo.originals.fingerprint import fingerprint, object_at
from tests.support.attend import RecordingAttend

FUNCTIONS = {path: (form, code) for form, functions in FORMS.items() for path, code in functions.items()}
BATCH, HEADS, LENGTH, DIM = 2, 3, 7, 8


def function_at(path):
    try:
        return object_at(f"transformers.models.{path}")
    except (ImportError, AttributeError):
        pytest.skip(f"this version of transformers has no {path}")


class Module(nn.Module):
    """The attributes that eager attention functions read."""

    is_causal, num_key_value_groups, head_dim = False, 1, DIM

    def __init__(self, sinks):
        super().__init__()
        self.config = type("Config", (), {"_attn_implementation": "eager"})
        self.sinks = nn.Parameter(torch.randn(HEADS, dtype=torch.float64)) if sinks else None


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("path", FUNCTIONS)
def test_the_form_describes_the_function(path, monkeypatch):
    form, code = FUNCTIONS[path]
    function = function_at(path)
    if fingerprint(function) != code:
        pytest.skip("this version of transformers has another function here")
    module = Module(form.sinks == "module").eval()
    query, key, value = normal(3, BATCH, HEADS, LENGTH, DIM)
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.float64)
    mask[0, :, :, 5:] = torch.finfo(torch.float64).min
    keywords = {"scaling": 0.7, "dropout": 0.5}  # the module is in eval mode, so nothing is dropped
    if form.position_bias:
        keywords["position_bias"] = normal(1, HEADS, LENGTH, LENGTH)
    if form.softcap:
        keywords["softcap"] = 1.5
    if form.sinks == "argument":
        keywords["sinks"] = normal(BATCH, HEADS, LENGTH, 1)
    arguments = (module, query, key, value, mask)
    expected, weights = function(*arguments, **keywords)
    got, probabilities = AnyInterfaceAttention().compute(
        module,
        RecordingAttend("eager"),
        "eager",
        *arguments[1:],
        **keywords,
        output_attentions=form.weights_with_sinks,
        form=form,
    )
    # Some functions compute the softmax in float32.
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-5, atol=1e-6)
    if form.weights_with_sinks:
        torch.testing.assert_close(probabilities, weights.to(got.dtype), rtol=1e-5, atol=1e-6)
