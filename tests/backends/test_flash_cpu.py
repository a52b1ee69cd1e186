"""The private CPU FlashAttention operators do what the backend relies on, and the backend also works without them."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode  # no public function shows new tensors

import attnzoo
from attnzoo import testing
from attnzoo.backends.sdpa import flash_cpu
from attnzoo.backends.sdpa.trained_bias import backward_by_hand
from attnzoo.conformance.attention_check import check_attention
from attnzoo.registry import registry
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import SortedChunks
from attnzoo.testing import AttentionCase

forward = getattr(torch.ops.aten, flash_cpu._FORWARD)
backward = getattr(torch.ops.aten, flash_cpu._BACKWARD)


def tensors(dtype=torch.float64, q_len=5, kv_len=7):
    return [torch.randn(2, 3, n, 8, dtype=dtype) for n in (q_len, kv_len, kv_len)]


def test_the_installed_torch_has_the_operators():
    assert flash_cpu.unavailable() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lse_is_the_logsumexp_of_the_masked_scores(dtype):
    query, key, value = tensors(dtype)
    mask = torch.zeros(2, 3, 5, 7, dtype=dtype).masked_fill(torch.rand(2, 3, 5, 7) < 0.4, float("-inf"))
    mask[..., 0] = 0.0
    _, lse = forward(query, key, value, 0.0, False, attn_mask=mask, scale=0.3)
    scores = query.double() @ key.double().transpose(-1, -2) * 0.3 + mask.double()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=8 * torch.finfo(dtype).eps, rtol=0.0)


def test_a_row_that_sees_no_key_has_output_0_and_lse_0():
    query, key, value = tensors()
    mask = torch.zeros(2, 3, 5, 7, dtype=query.dtype)
    mask[0, 0, 2] = float("-inf")
    out, lse = forward(query, key, value, 0.0, False, attn_mask=mask)
    assert (out[0, 0, 2] == 0).all() and lse[0, 0, 2] == 0
    grads = backward(torch.randn_like(out), query, key, value, out, lse, 0.0, False, attn_mask=mask)
    assert (grads[0][0, 0, 2] == 0).all()


def test_the_backward_of_a_part_is_exact_with_the_final_out_and_lse():
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    whole = torch.softmax(query @ key.transpose(-1, -2), -1) @ value
    cotangent = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, (query, key, value), cotangent)
    out, lse = forward(query, key, value, 0.0, False, scale=1.0)
    got = torch.zeros_like(query), [], []
    for part in (slice(0, 3), slice(3, 7)):
        k, v = key.detach()[:, :, part], value.detach()[:, :, part]
        grads = backward(cotangent, query.detach(), k, v, out.detach(), lse.detach(), 0.0, False, scale=1.0)
        got[0].add_(grads[0])
        got[1].append(grads[1])
        got[2].append(grads[2])
    for actual, wanted in zip((got[0], torch.cat(got[1], 2), torch.cat(got[2], 2)), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("missing", [flash_cpu._FORWARD, flash_cpu._BACKWARD])
def test_sdpa_runs_on_public_functions_without_the_operators(monkeypatch, missing):
    class Ops:
        def __getattr__(self, name):
            if name == missing:
                raise AttributeError(name)
            return getattr(torch.ops.aten, name)

    monkeypatch.setattr(flash_cpu, "_operators", Ops())
    flash_cpu.unavailable.cache_clear()
    try:
        assert missing in flash_cpu.unavailable()
        if missing == flash_cpu._FORWARD:  # the other operator leads to the same functions
            short = [case for case in testing.cases((torch.float32,)) if case.q_len < 100 and not case.transform]
            outcomes = [testing.run_case(registry.make_backend("sdpa"), case) for case in short]
            assert not [str(outcome) for outcome in outcomes if outcome.failure]
        query, key, value = tensors(torch.float32, 40, 40)
        attention = attnzoo.Attention(query, (attnzoo.Segment(key, value, attnzoo.Window(3, 3)),), 1.0)
        assert "flash_cpu" not in registry.make_backend("sdpa").run(attention).kernel
    finally:
        monkeypatch.undo()
        flash_cpu.unavailable.cache_clear()


def test_the_graph_keeps_each_tensor_only_once():
    query, key, value = (tensor.requires_grad_() for tensor in tensors(torch.float32, 300, 300))
    attention = attnzoo.Attention(query, (attnzoo.Segment(key, value, attnzoo.Window(8, 8)),), 1.0)
    shells = flash_cpu._without_storage(attention)
    for tensor in (shells.query, shells.segments[0].key, shells.segments[0].value):
        assert tensor.untyped_storage().nbytes() <= 8


class Dtypes(TorchDispatchMode):
    """Records the dtype of each new tensor with ``size`` or more elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.dtypes = size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size:
                self.dtypes.add(tensor.dtype)
        return result


def test_an_output_in_half_precision_is_accumulated_in_float32_only_if_several_passes_write_it():
    whole = AttentionCase(torch.bfloat16, attnzoo.Window(8, 8), q_len=300, kv_len=300).attention()
    hashed = AttentionCase(torch.bfloat16, HashedChunks(5, 1, 1), q_len=300, kv_len=300).attention()  # another pass
    both = replace(whole, segments=(*whole.segments, *hashed.segments))
    for attention, dtypes in ((whole, {torch.bfloat16}), (both, {torch.bfloat16, torch.float32})):
        with Dtypes(whole.query.numel()) as new, torch.no_grad():
            output = flash_cpu.attend(attention)
        assert output.dtype == torch.bfloat16 and new.dtypes == dtypes


@pytest.mark.parametrize("trained", [False, True])
def test_a_backward_inside_autocast_is_as_exact_as_outside(trained):
    query, key, value = (tensor.requires_grad_() for tensor in tensors(torch.float32, 40, 40))
    values = torch.randn(3, 15, requires_grad=trained)
    bias = attnzoo.RelativeBias(values, zero=7)
    attention = attnzoo.Attention(query, (attnzoo.Segment(key, value, attnzoo.Window(5, 5), bias=bias),), 0.4)
    leaves = [tensor for tensor in attention.tensors() if tensor.requires_grad]

    def gradients(autocast):
        output = registry.make_backend("sdpa").run(attention).output
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(output, leaves, torch.ones_like(output))

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(inside, outside)


def test_gradients_by_hand_do_not_use_the_rounded_out_and_lse():
    query, key, value = (tensor.requires_grad_() for tensor in tensors(torch.float64))
    scores = query @ key.transpose(-1, -2) * 0.4
    out, lse = torch.softmax(scores, -1) @ value, scores.logsumexp(-1)
    cotangent = torch.randn_like(out)
    expected = torch.autograd.grad(out, (query, key, value, scores), cotangent)
    rows = [tensor.detach() for tensor in (cotangent, query, out + 0.1, lse + 0.1)]  # wrong on purpose
    pairs = [(key.detach()[:, :, part], value.detach()[:, :, part]) for part in (slice(0, 3), slice(3, 7))]
    parts = backward_by_hand(rows, pairs, [None, None], 0.4, is_whole=True)
    got = [sum(part[0] for part in parts), *(torch.cat([p[i] for p in parts], 2) for i in (1, 2))]
    for actual, wanted in zip(got, expected, strict=False):
        torch.testing.assert_close(actual, wanted)
    grad_scores = torch.cat([part[3] for part in parts], dim=-1)
    torch.testing.assert_close(grad_scores, expected[3])
    assert grad_scores.sum(-1).abs().max() < 1e-14, "a constant added to a row's scores changes nothing"


@pytest.mark.parametrize("written", ["key_mask", "mask", "bias", "trained"])
def test_writing_to_a_mask_or_bias_before_the_backward_raises(written):
    """The backward reads masks and biases again, so the gradients would silently belong to another attention."""
    query, key, value = (tensor.requires_grad_() for tensor in tensors(kv_len=5))
    masks = {"key_mask": torch.ones(2, 5, dtype=torch.bool), "mask": torch.rand(1, 1, 5, 5) < 0.8}
    table = torch.randn(3, 7, requires_grad=written == "trained") * 1.0
    segment = attnzoo.Segment(
        *(key, value, attnzoo.Window(2, 1)),
        **{name: mask for name, mask in masks.items() if name == written},
        bias=None if written in masks else attnzoo.RelativeBias(table, 3),
    )
    output = registry.make_backend("sdpa").run(attnzoo.Attention(query, (segment,), 0.3)).output
    with torch.no_grad():
        masks.get(written, table).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_masks_from_inference_mode_work_in_training():
    with torch.inference_mode():
        key_mask = torch.arange(5).expand(2, 5) < 4
    query, key, value = (tensor.requires_grad_() for tensor in tensors(kv_len=5))
    segment = attnzoo.Segment(key, value, attnzoo.Window(2, 1), key_mask)
    registry.make_backend("sdpa").run(attnzoo.Attention(query, (segment,), 0.3)).output.sum().backward()
    assert (key.grad[:, :, 4] == 0.0).all() and (key.grad[:, :, :4] != 0.0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", [SortedChunks(8, 1, 1), HashedChunks(5, 1, 1)], ids=str)
def test_a_trained_bias_works_beside_reordered_keys(pattern, dtype):
    """The reordered keys are in another pass. The gradient of the bias depends on their softmax weight."""
    whole = AttentionCase(dtype, pattern, q_len=300, kv_len=300).attention()
    key, value = (torch.randn(3, 4, 40, whole.head_dim).to(dtype) for _ in range(2))
    bias = attnzoo.RelativeBias(torch.randn(4, 5).to(dtype).requires_grad_(), 2)
    biased = attnzoo.Segment(key, value, attnzoo.Window(200, 200, 0), bias=bias)
    report = check_attention(
        "case", replace(whole, segments=(*whole.segments, biased)), registry.make_backend("sdpa"), grad=True
    )
    assert report.ok and report.kernel == flash_cpu.KERNEL, report
