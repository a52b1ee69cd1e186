"""``flash_attention_2`` on fake kernels: every supported attention against the oracle, and whole models."""

import sys
from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo import testing
from attnzoo.backends.varlen import packed
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.conformance import error_rule
from attnzoo.spec.patterns import SortedChunks
from attnzoo.testing import AttentionCase
from tests.support.half import HALF, agrees, attention, heads, unpadded
from tests.support.models import (
    causal_inputs,
    causal_prompt,
    gpt_bigcode,
    gpt_neox,
    led,
    led_inputs,
    longformer,
    longformer_inputs,
    reformer,
)


def test_flash_attn_passes_the_kit(flash_attn):
    report = testing.check_backend(FlashBackend(), dtypes=(HALF, torch.float64))
    assert {outcome.case.dtype for outcome in report.outcomes if not outcome.refused} == {HALF}
    taken = {type(outcome.case.pattern) for outcome in report.outcomes if not outcome.refused}
    assert taken == FlashBackend.capabilities.patterns
    assert any(outcome.case.dropout and not outcome.refused for outcome in report.outcomes)


def test_varlen_passes_the_kit(varlen):
    report = testing.check_backend(FlashBackend(kernel="varlen"), dtypes=(HALF,))
    assert not any(outcome.case.dropout and not outcome.refused for outcome in report.outcomes)
    assert {"forward", "backward"} == {name for name, _ in varlen}


@pytest.mark.parametrize("pattern", [attnzoo.Window(9, 0), SortedChunks(8, 1, 0, causal=True)], ids=str)
def test_flash_attn_runs_long_inputs_in_bfloat16(flash_attn, pattern):
    mask = "keys" if isinstance(pattern, SortedChunks) else "globals"
    case = AttentionCase(torch.bfloat16, pattern, mask, kv_heads=2, q_len=300, kv_len=300)
    assert not testing.run_case(FlashBackend(), case).failure


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["varlen", "flash_attn"])
def test_the_real_kernels_pass_the_kit(kernel, dtype):
    reason = {each.name: each.unavailable() for each in FlashBackend.kernels}[kernel]
    if reason:
        pytest.skip(reason)
    testing.check_backend(FlashBackend(kernel=kernel), device="cuda", dtypes=(dtype,))


@pytest.mark.parametrize("scale", [2.0**-14, 1e-3, 0.25, 1.0, 8.0])
def test_hidden_keys_have_no_weight_at_any_scale(flash_attn, scale):
    holes = torch.arange(20)[None].expand(2, 20) % 3 != 1
    whole = attention(attnzoo.Window(2, 1), key_mask=holes, scale=scale)
    assert packed.plan_calls(whole).hidden[0] is not None
    agrees(whole, FlashBackend())
    query, (segment,) = whole.query, whole.segments
    large = replace(segment, value=segment.value.masked_fill(~holes[:, None, :, None], 60000.0))
    output = FlashBackend().run(replace(whole, query=query, segments=(large,))).output
    assert torch.equal(output, FlashBackend().run(whole).output)


def test_segments_that_share_keys_can_hide_different_keys(flash_attn):
    whole = attention(attnzoo.Window(2, 2), key_mask=torch.arange(20)[None].expand(2, 20) % 3 != 1)
    (segment,) = whole.segments
    others = [replace(segment, pattern=attnzoo.Window(6, 0), key_mask=mask)
              for mask in (None, torch.arange(20)[None].expand(2, 20) % 5 != 1)]  # fmt: skip
    whole = replace(whole, segments=(segment, *others))
    agrees(whole, FlashBackend())
    apart = whole.with_tensors(tuple(tensor.clone() for tensor in whole.tensors()))
    assert torch.equal(FlashBackend().run(whole).output, FlashBackend().run(apart).output)


def test_the_backward_of_a_union_drops_the_same_weights_as_its_forward(flash_attn):
    whole = attention(attnzoo.Window(4, 4), grad=True)
    (window,) = whole.segments
    globals_ = attnzoo.Segment(heads(3, seed=7, grad=True), heads(3, seed=8, grad=True))
    whole = replace(whole, segments=(window, globals_), dropout=0.4)
    wide = attnzoo.Attention(*padded_to(whole, 24), whole.scale, 0.4)

    def run(attention):
        torch.manual_seed(3)
        return FlashBackend().run(attention).output

    factors = (run(wide).detach()[..., :23] != 0).double() / 0.6
    cotangent = torch.randn(whole.query.shape, dtype=torch.float64)

    def dropped(tensors):
        """Compute the attention by definition, in the tensors' dtype, with the weights that the kernel dropped."""
        query, *keys_values = tensors
        keys, values = (torch.cat(keys_values[start::2], dim=2) for start in (0, 1))
        seen = torch.cat([(torch.arange(20)[:, None] - torch.arange(20)).abs() <= 4, torch.ones(20, 3).bool()], dim=1)
        scores = (query @ keys.transpose(-1, -2) * whole.scale).masked_fill(~seen, -torch.inf)
        return (torch.softmax(scores, -1) * factors.to(query.dtype)) @ values

    def gradient(output, tensors):
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(output, tensors, cotangent.to(output.dtype))])

    double = [tensor.detach().double().requires_grad_() for tensor in whole.tensors()]
    reference, eager = dropped(double), dropped(whole.tensors())
    output = run(whole)
    assert error_rule.check("output", output, reference, eager, error_rule.FORWARD).ok
    pairs = ((output, whole.tensors()), (reference, double), (eager, whole.tensors()))
    assert error_rule.check("gradient", *(gradient(*pair) for pair in pairs), error_rule.GRADIENT).ok


def padded_to(whole, dim):
    """Query and segments with one-hot values, so that the output is the softmax weights."""
    pad = torch.nn.functional.pad
    one_hot, segments, start = torch.eye(dim, dtype=HALF), [], 0
    for segment in whole.segments:
        rows = one_hot[start : start + segment.kv_len].expand(2, 2, -1, -1)
        segments.append(replace(segment, key=pad(segment.key.detach(), (0, dim - 8)), value=rows.contiguous()))
        start += segment.kv_len
    return pad(whole.query.detach(), (0, dim - 8)), tuple(segments)


def test_a_row_that_sees_only_hidden_keys_gives_zero_or_empty(flash_attn):
    nearly = torch.zeros((2, 20), dtype=torch.bool)
    nearly[:, [0, 19]] = True
    whole = attention(attnzoo.Window(2, 1), key_mask=nearly)
    output = FlashBackend().run(whole).output
    assert (output[:, :, 5:15] == 0).all() and (output[:, :, 0] != 0).all()
    filled = replace(whole, empty=heads(20, seed=5))
    assert torch.equal(FlashBackend().run(filled).output[:, :, 5:15], filled.empty[:, :, 5:15])
    agrees(filled, FlashBackend())


@pytest.mark.parametrize("kernel", ["flash_attn", "varlen"])
def test_a_plan_from_inference_mode_is_not_reused_in_training(flash_attn, varlen, kernel):
    backend, mask = FlashBackend(kernel=kernel), unpadded(13, 7)
    for masks in (dict(key_mask=mask, query_mask=mask), {}):
        with torch.inference_mode():
            backend.run(attention(attnzoo.Window(4, 4), **masks))
        agrees(attention(attnzoo.Window(4, 4), **masks, grad=True), backend)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_the_scale_may_be_zero_or_negative(flash_attn, scale):
    agrees(attention(attnzoo.Causal(), scale=scale), FlashBackend())


# Models


def test_led_trains_and_infers_in_bfloat16(flash_attn):
    report = attnzoo.verify(led().bfloat16(), led_inputs(40, "every", batch=4), "flash")
    assert report.ok, str(report)
    assert {site.kernel for site in report.sites} == {"flash_attn"}


@pytest.mark.parametrize("build", [longformer, reformer, gpt_neox, gpt_bigcode], ids=lambda build: build.__name__)
def test_varlen_runs_other_families(varlen, build):
    inputs = longformer_inputs(23, "left") if build is longformer else causal_inputs(23, "left")
    report = attnzoo.verify(build().bfloat16(), inputs, FlashBackend(kernel="varlen"))
    assert report.ok, str(report)
    assert {site.kernel for site in report.sites} == {"varlen"}


def test_autocast_decides_the_dtype_at_patching_and_at_each_call(flash_attn):
    model, inputs = gpt_neox(), dict(input_ids=torch.arange(3, 15)[None])
    with pytest.raises(attnzoo.BackendRefusedError, match=r"allowed: bfloat16, float16, or torch\.autocast"):
        attnzoo.patch(model, "flash")
    with torch.autocast("cpu", torch.bfloat16):
        handle = attnzoo.patch(model, "flash")
        model(**inputs).logits.sum().backward()
    assert handle.sites[0].calls == 1 and flash_attn.CALLS[-1][1]["q"].dtype == torch.bfloat16
    with pytest.raises(attnzoo.BackendRefusedError, match=r"gpt_neox\.layers\.0\.attention"):
        model(**inputs)


def test_float32_queries_and_keys_run_in_the_dtype_of_the_values(flash_attn, monkeypatch):
    model = gpt_neox().bfloat16()
    file = sys.modules[type(model).__module__]
    rotate = file.apply_rotary_pos_emb
    monkeypatch.setattr(file, "apply_rotary_pos_emb", lambda *args: tuple(each.float() for each in rotate(*args)))
    with attnzoo.patch(model, "flash"):
        model(torch.arange(3, 15)[None], use_cache=False)
    assert flash_attn.CALLS[-1][1]["q"].dtype == torch.bfloat16


@pytest.mark.parametrize("build", [reformer, gpt_neox, gpt_bigcode], ids=lambda build: build.__name__)
def test_decoders_generate_the_same_tokens_as_eager(flash_attn, build):
    model, inputs = build().half(), causal_prompt("left")
    asked = dict(max_new_tokens=6, do_sample=False)
    with attnzoo.patch(model, "eager"):
        expected = model.generate(**inputs, **asked)
    with attnzoo.patch(model, "flash") as handle:
        assert torch.equal(model.generate(**inputs, **asked), expected)
    assert {site.kernel for site in handle.sites} == {"flash_attn"}
