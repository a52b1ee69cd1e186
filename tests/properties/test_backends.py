"""Every backend agrees with the oracle on drawn attentions, forward and backward."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, note

import attnzoo
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.segments import Attention
from tests.conftest import DEVICES
from tests.support.drawn_attentions import attentions

BACKENDS = [name for name, info in attnzoo.backends().items() if info.available and info.exact and name != "eager"]


def on(device, attention):
    """The attention with all tensors on a device."""

    def moved(tensor):
        return None if tensor is None else tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    def moved_segment(segment):
        bias = segment.bias
        if isinstance(bias, RelativeBias):
            bias = replace(bias, positions=moved(bias.positions))
        return replace(segment, key_mask=moved(segment.key_mask), mask=moved(segment.mask), bias=bias)

    # An attention refuses tensors on different devices, so the checks must not run before all of them have moved.
    parts = object.__new__(Attention)
    vars(parts).update(vars(attention), query_mask=moved(attention.query_mask))
    vars(parts)["segments"] = tuple(map(moved_segment, attention.segments))
    return parts.with_tensors(tuple(map(moved, attention.tensors())))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@given(attention=attentions(), grad=st.booleans())
def test_backend_agrees_with_the_oracle(device, backend, attention, grad):
    backend, attention = registry.make_backend(backend), on(device, attention)
    note(f"{attention.request()}")
    if registry.refusals(backend, attention.request()):
        with pytest.raises(attnzoo.BackendRefusedError):
            execute(backend, attention)
        return
    report = check_attention("drawn", attention, backend, grad=grad, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, report.checks))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
@given(attention=attentions())
def test_rows_without_visible_keys_are_zero_forward_and_backward(device, backend, attention):
    backend, attention = registry.make_backend(backend), on(device, attention)
    if registry.refusals(backend, attention.request()):
        return
    rows = torch.arange(attention.q_len, device=device)
    has_visible_key = torch.zeros((attention.batch, attention.heads, attention.q_len), dtype=torch.bool, device=device)
    for segment in attention.segments:
        seen = segment.visible(rows, torch.arange(segment.kv_len, device=device), attention.q_len)
        has_visible_key |= torch.ones((), dtype=torch.bool, device=device) if seen is None else seen.any(-1)
    if attention.query_mask is not None:
        has_visible_key &= attention.query_mask[:, None]
    output = execute(backend, attention).output
    leaves = [tensor for tensor in attention.tensors() if tensor.requires_grad]
    (grad_query, *others) = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert (output[~has_visible_key] == 0).all()
    assert (grad_query[~has_visible_key] == 0).all()
    assert all(grad.isfinite().all() for grad in others)
