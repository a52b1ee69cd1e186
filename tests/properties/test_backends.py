"""Every backend agrees with the oracle on drawn attentions, forward and backward."""

from dataclasses import fields, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, note, settings

import attnzoo
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention, detached
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.segments import Attention
from tests.properties.conftest import AVAILABLE
from tests.support.drawn_attentions import MOSTLY, attentions, moved
from tests.support.small_blocks import block_sizes

PER_KIND = settings(max_examples=settings().max_examples // 5)
PER_THIRD = settings(max_examples=settings().max_examples // 3)
A_FEW = settings(max_examples=max(5, settings().max_examples // 15))  # long inputs are slow


def on(device, attention):
    """The attention with all tensors on a device."""
    if attention.query.device.type == device:
        return attention

    def to_device(value):
        return (
            value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        )

    def fields_to_device(part):
        return replace(part, **{item.name: to_device(getattr(part, item.name)) for item in fields(part)})

    def segment_to_device(segment):
        pattern, bias = fields_to_device(segment.pattern), segment.bias
        if isinstance(pattern, HashedChunks):
            pattern = replace(pattern, rounds=tuple(map(fields_to_device, pattern.rounds)))
        if isinstance(bias, RelativeBias):
            bias = replace(bias, positions=to_device(bias.positions))
        masks = dict(key_mask=to_device(segment.key_mask), mask=to_device(segment.mask))
        return replace(segment, pattern=pattern, bias=bias, **masks)

    # An attention refuses tensors on different devices, so the checks must not run before all of them have moved.
    parts = object.__new__(Attention)
    vars(parts).update(vars(attention), query_mask=to_device(attention.query_mask))
    vars(parts)["segments"] = tuple(map(segment_to_device, attention.segments))
    return parts.with_tensors(tuple(map(to_device, attention.tensors())))


def assert_agrees(subject, attention, grad):
    """Assert that the backend agrees with the oracle, or refuses an attention that it declares to refuse."""
    attention, grad = on(subject.device, attention), grad and subject.grad
    note(f"{attention.request()}")
    with torch.set_grad_enabled(grad):
        if registry.refusals(subject.backend, attention.request()):
            with pytest.raises(attnzoo.BackendRefusedError):
                execute(subject.backend, attention)
            return
    report = check_attention("drawn", attention, subject.backend, grad=grad, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, report.checks))


@PER_KIND
@given(st.data(), MOSTLY, st.booleans())
def test_backend_agrees_with_the_oracle(subject_and_kind, data, grad, are_small):
    subject, kind = subject_and_kind
    attention = data.draw(subject.attentions(kinds=[kind]))
    with block_sizes(are_small):
        assert_agrees(subject, attention, grad)


@A_FEW
@given(st.data(), MOSTLY)
def test_backend_agrees_beyond_one_internal_block(subject, data, grad):
    assert_agrees(subject, data.draw(subject.attentions(is_long=True)), grad)


@PER_KIND
@given(st.data(), MOSTLY)
def test_backend_agrees_when_one_segment_differs(subject_and_difference, data, grad):
    """A backend must not use a value that is cached for a mask or bias for another segment."""
    subject, difference = subject_and_difference
    attention = data.draw(subject.attentions(kinds=["one difference"], differences=[difference]))
    assert_agrees(subject, attention, grad)
    if difference in ("key mask", "mask", "bias"):
        assert_agrees(subject, moved(attention), grad)


@PER_THIRD
@given(st.data())
def test_autocast_changes_neither_the_dtype_nor_the_result(subject, data):
    """The caller converts tensors for autocast. A backend computes in the dtype of the tensors.

    The backward runs outside of autocast, as PyTorch recommends: the plain operations of the math kernel would round.
    """
    attention = on(subject.device, data.draw(subject.attentions()))

    def outcome(autocast):
        copy = detached(attention, attention.query.dtype, subject.grad)
        with torch.autocast(subject.device, torch.bfloat16, enabled=autocast):
            output = execute(subject.backend, copy).output
        leaves = [leaf for leaf in copy.tensors() if leaf.requires_grad]
        unused = dict(allow_unused=True, materialize_grads=True)
        return output, *(torch.autograd.grad(output.sum(), leaves, **unused) if leaves else ())

    with torch.set_grad_enabled(subject.grad):
        if registry.refusals(subject.backend, attention.request()):
            return
        got, expected = outcome(True), outcome(False)
    for ours, plain in zip(got, expected, strict=True):
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)


@given(st.data(), st.booleans())
def test_rows_without_visible_keys_get_empty_or_zero_forward_and_backward(subject_or_oracle, data, are_small):
    subject = subject_or_oracle
    attention, backend = on(subject.device, data.draw(subject.attentions())), subject.backend
    with torch.set_grad_enabled(subject.grad), block_sizes(are_small):
        if registry.refusals(backend, attention.request()):
            return
        rows = torch.arange(attention.q_len, device=subject.device)
        shape, device = (attention.batch, attention.heads, attention.q_len), subject.device
        has_visible_key = torch.zeros(shape, dtype=torch.bool, device=device)
        for segment in attention.segments:
            seen = segment.visible(rows, torch.arange(segment.kv_len, device=device), attention.q_len)
            has_visible_key |= torch.ones((), dtype=torch.bool, device=device) if seen is None else seen.any(-1)
        output = execute(backend, attention).output
        is_query = torch.ones(shape, dtype=torch.bool, device=device)
        if attention.query_mask is not None:
            is_query &= attention.query_mask[:, None]
        empty = torch.zeros_like(output) if attention.empty is None else attention.empty
        assert (output[~is_query] == 0).all()
        assert (output == empty)[is_query & ~has_visible_key].all()
        if not subject.grad:
            return
        leaves = [tensor for tensor in attention.tensors() if tensor.requires_grad]
        unused = dict(allow_unused=True, materialize_grads=True)  # "empty" is unused if every query sees a key
        (grad_query, *others) = torch.autograd.grad(output, leaves, torch.ones_like(output), **unused)
    assert (grad_query[~(is_query & has_visible_key)] == 0).all()
    assert all(grad.isfinite().all() for grad in others)
    if attention.empty is not None:
        assert torch.equal(others[-1][..., 0] != 0, is_query & ~has_visible_key)


@pytest.mark.parametrize("name", AVAILABLE)
@given(attention=attentions())
def test_backend_computes_or_refuses_any_attention(name, attention):
    backend = registry.make_backend(name)
    if registry.refusals(backend, attention.request()):
        with pytest.raises(attnzoo.BackendRefusedError):
            execute(backend, attention)
    elif name != "eager":
        assert execute(backend, attention).output.isfinite().all()
