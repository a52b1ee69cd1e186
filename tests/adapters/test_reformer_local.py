"""Reformer's local attention equals the original; long inputs are computed in slices."""

import pytest
import torch

import attnzoo
from attnzoo.adapters import reformer_local
from tests.support.reformer import (
    CHUNK,
    NEIGHBOURS,
    assert_module_equals_the_original,
    attentions,
    backends,
    causal,
    hidden,
    local,
    padding,
    sides,
)


@backends
@causal
@sides
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, 2 * CHUNK, 7 * CHUNK])
def test_local_equals_the_original(is_decoder, backend, side, length):
    module = attentions(local(is_decoder=is_decoder, local_num_chunks_after=0 if is_decoder else 1))[0]
    mask = padding(side, 3, length)
    if side == "sample":
        mask[-1, 0] = 1  # a sample of padding only has nothing to compare
    assert_module_equals_the_original(module, hidden(3, length), mask, backend)


@backends
@causal
@pytest.mark.parametrize("around", NEIGHBOURS, ids=str)
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_local_repeats_wrapped_neighbours_as_the_original(is_decoder, backend, around, chunks):
    before, after = around
    module = attentions(local(is_decoder=is_decoder, local_num_chunks_before=before, local_num_chunks_after=after))[0]
    assert_module_equals_the_original(module, hidden(2, chunks * CHUNK), None, backend)


@backends
@causal
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("around", [(0, 0), (1, 0), (0, 1), (1, 1), (2, 3)], ids=str)
def test_slices_of_long_inputs_equal_the_original(monkeypatch, is_decoder, backend, side, around):
    monkeypatch.setattr(reformer_local, "SLICE", 2 * CHUNK)
    monkeypatch.setattr(reformer_local, "SLICE_PER_NEIGHBOURHOOD", 1)
    before, after = around
    size = max(2, before + after) * CHUNK
    model = local(is_decoder=is_decoder, local_num_chunks_before=before, local_num_chunks_after=after).double()
    module, length = attentions(model)[0], 3 * size + CHUNK
    states, mask = hidden(3, length).double(), padding(side, 3, length)
    real = ... if mask is None else mask.bool()
    with torch.no_grad():
        expected = module(states, attention_mask=mask).hidden_states
        with attnzoo.patch(model, backend) as handle:
            got = module(states, attention_mask=mask).hidden_states
    torch.testing.assert_close(got[real], expected[real], rtol=1e-10, atol=1e-10)
    in_slices = not (is_decoder and after)  # otherwise the last chunk sees the first
    assert handle.sites[0].calls == (4 if in_slices else 1)


def test_slices_are_used_only_if_they_change_no_result():
    model = local(max_position_embeddings=8192)
    module, states = attentions(model)[0], hidden(1, 2 * reformer_local.SLICE)

    def calls(train=False, grad=False, backend="sdpa", **arguments):
        with torch.set_grad_enabled(grad), attnzoo.patch(model.train(train), backend) as handle:
            module(states[:, : arguments.pop("length", None)], **arguments)
        return handle.sites[0].calls

    assert calls() == 2
    assert calls(train=True) == calls(grad=True) == calls(length=2 * reformer_local.SLICE - CHUNK) == 1
    assert calls(backend="eager", output_attentions=True, length=8 * CHUNK) == 1


def test_a_gpu_computes_all_tokens_at_once():
    pytest.importorskip("triton", reason="the package triton is not installed")
    from tests.support.device_without_data import run_module

    module, states = attentions(local())[0], hidden(1, 2 * reformer_local.SLICE)
    ran = run_module(module, (states,), {}, "triton", train=False)
    assert ran.forward == ["mm", "mm", "mm", "forward_kernel"]


def test_projections_run_on_one_slice_at_a_time():
    model, length = local(max_position_embeddings=16384), 5 * reformer_local.SLICE
    sizes = []
    for projection in (attentions(model)[0].query, attentions(model)[0].key, attentions(model)[0].value):
        projection.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        attentions(model)[0](hidden(1, length))
    assert max(sizes) <= reformer_local.SLICE + CHUNK
    assert sum(sizes) <= 3 * (length + 5 * CHUNK)
