"""The Triton kernels agree with the oracle on drawn attentions, forward and backward."""

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings

import attnzoo
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.functional import execute
from attnzoo.registry import registry
from tests.properties.conftest import only_new_examples  # noqa: F401
from tests.support.drawn_attentions import attentions, supported_kinds

pytestmark = pytest.mark.usefixtures("no_overflow_checks")
BACKEND = attnzoo.configure("triton")
EXAMPLES = int(os.environ.get("ATTNZOO_INTERPRETED_EXAMPLES", 3))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("kind", supported_kinds(BACKEND.capabilities))
@given(st.data(), st.booleans())
def test_triton_agrees_with_the_oracle(kind, data, grad):
    attention = data.draw(attentions(BACKEND.capabilities, kinds=[kind]))
    note(f"{attention.request()}")
    with torch.set_grad_enabled(grad):
        if registry.refusals(BACKEND, attention.request()):
            with pytest.raises(attnzoo.BackendRefusedError):
                execute(BACKEND, attention)
            return
    report = check_attention("drawn", attention, BACKEND, grad=grad, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, report.checks))
