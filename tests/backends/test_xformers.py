"""``xformers`` on a fake package: every supported attention against the oracle, and the biases it gets."""

import importlib
import inspect
from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo import testing
from attnzoo.backends.varlen import kernels, xformers_kernels
from attnzoo.backends.varlen.xformers import XformersBackend
from attnzoo.reporting import doctor
from attnzoo.testing import AttentionCase
from tests.support.half import HALF, agrees, attention, refusals, unpadded
from tests.support.models import gpt_neox, led, led_inputs

# Against the oracle


@pytest.mark.parametrize("kernel", ["xformers_flash", "xformers_cutlass"])
def test_both_kernels_pass_the_kit(xformers, kernel):
    report = testing.check_backend(XformersBackend(kernel=kernel), dtypes=(HALF, torch.float64))
    taken = {type(outcome.case.pattern) for outcome in report.outcomes if not outcome.refused}
    windows = {attnzoo.Window} if kernel == "xformers_cutlass" else set()
    assert taken == XformersBackend.capabilities.patterns - windows


def test_float32_passes_the_kit(xformers):
    backend, cases = XformersBackend(), [case for case in testing.cases((torch.float32,)) if case.q_len < 700]
    outcomes = [testing.run_case(backend, case) for case in cases]
    assert not [str(outcome) for outcome in outcomes if outcome.failure]
    assert sum(not outcome.refused for outcome in outcomes) > 40


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["xformers_flash", "xformers_cutlass"])
def test_the_real_kernels_pass_the_kit(kernel, dtype):
    reason = {each.name: each.unavailable() for each in XformersBackend.kernels}[kernel]
    if reason or (dtype == torch.float32 and kernel == "xformers_flash"):
        pytest.skip(reason or "half precision only")
    testing.check_backend(XformersBackend(kernel=kernel), device="cuda", dtypes=(dtype,))


# What xformers gets


def ran(xformers, whole, backend=None):
    xformers.CALLS.clear()
    result = (backend or XformersBackend()).run(whole)
    return [(name, operator, bias) for name, operator, bias, _ in xformers.CALLS], result


@pytest.mark.parametrize(
    ("pattern", "bias"),
    [
        (attnzoo.Full(), "BlockDiagonalMask"),
        (attnzoo.Causal(), "BlockDiagonalCausalFromBottomRightMask"),
        (attnzoo.Window(4, 0), "BlockDiagonalCausalLocalAttentionFromBottomRightMask"),
        (attnzoo.Window(4, 3), "LocalAttentionFromBottomRightMask"),
        (attnzoo.Chunks(5, 1, 0, causal=True), "BlockDiagonalCausalFromBottomRightMask"),
    ],
    ids=str,
)
def test_each_pattern_becomes_its_bias(xformers, pattern, bias):
    [(name, operator, given)], result = ran(xformers, attention(pattern))
    assert (name, operator, type(given).__name__) == ("attention", "fa2F@2.8.3", bias)
    assert result.kernel == "xformers_flash"
    agrees(attention(pattern), XformersBackend())


def test_padding_is_left_out_of_the_packed_rows(xformers):
    mask = unpadded(13, 7)
    [(_, _, bias)], _ = ran(xformers, attention(attnzoo.Causal(), key_mask=mask, query_mask=mask))
    assert bias.q_seqinfo.lengths == bias.k_seqinfo.lengths == [13, 7]


def test_two_sided_windows_need_a_call_per_length(xformers):
    mask = unpadded(13, 7)
    calls, _ = ran(xformers, attention(attnzoo.Window(4, 3), key_mask=mask, query_mask=mask))
    assert [(bias.window_left, bias.window_right) for *_, bias in calls] == [(4, 3), (4, 3)]
    calls, _ = ran(xformers, attention(attnzoo.Window(4, 3)))
    assert len(calls) == 1


def test_unions_use_the_functions_with_lse(xformers):
    whole = attention(attnzoo.Window(4, 3), grad=True)
    (window,) = whole.segments
    whole = replace(whole, segments=(window, attnzoo.Segment(window.key[:, :, :2], window.value[:, :, :2])))
    calls, result = ran(xformers, whole)
    assert [(name, operator) for name, operator, _ in calls] == [("forward", "fa2F@2.8.3")] * 2
    xformers.CALLS.clear()
    result.output.sum().backward()
    assert [(name, operator) for name, operator, *_ in xformers.CALLS] == [("backward", "fa2B@2.8.3")] * 2
    agrees(whole, XformersBackend())


def test_float32_and_wide_heads_use_cutlass(xformers):
    for whole in (
        replace(AttentionCase(torch.float32, attnzoo.Causal(), grad=False).attention()),
        attention(attnzoo.Full(), dim=264),
    ):
        [(_, operator, _)], result = ran(xformers, whole)
        assert (operator, result.kernel) == ("cutlassF-pt", "xformers_cutlass")


def test_causal_attention_on_padded_keys_needs_no_window(xformers):
    mask = unpadded(13, 20)
    whole = attention(attnzoo.Causal(), key_mask=mask)
    calls, _ = ran(xformers, whole, XformersBackend(kernel="xformers_cutlass"))
    assert sorted(type(bias).__name__ for *_, bias in calls) == [
        "BlockDiagonalCausalFromBottomRightMask",
        "BlockDiagonalMask",
    ]
    agrees(whole, XformersBackend(kernel="xformers_cutlass"))


def test_grouped_key_heads_are_repeated_and_their_gradients_summed(xformers):
    whole = attention(attnzoo.Window(4, 3), kv_heads=1, grad=True)
    xformers.CALLS.clear()
    XformersBackend().run(whole)
    query, key, _ = xformers.CALLS[0][3]
    assert query.shape[2:] == key.shape[2:] == (2, 8)
    (segment,) = whole.segments
    parts = replace(whole, segments=(segment, attnzoo.Segment(segment.key[:, :, :2], segment.value[:, :, :2])))
    agrees(parts, XformersBackend())


# Refusals


def test_refusals_name_what_was_got_and_what_is_allowed(xformers):
    backend = XformersBackend()
    assert refusals(backend) == {}
    assert refusals(backend, dtype=torch.float64)["dtype"] == ("float64", "bfloat16, float16, float32")
    assert refusals(backend, bias="relative")["bias"] == ("relative", "none")
    assert refusals(backend, mask="dense")["mask"] == ("True", "no dense mask")
    assert refusals(backend, dropout=0.1)["dropout"] == ("True", "dropout=0.0, or a model in eval mode")
    windows = refusals(XformersBackend(kernel="xformers_cutlass"), pattern=attnzoo.Window(3, 3))
    allowed = "a pattern other than Window with kernel xformers_cutlass"
    assert windows == {"pattern": ("Window(left=3, right=3, offset=None)", allowed)}
    wide = refusals(backend, dtype=torch.float32, pattern=attnzoo.Window(3, 3))
    assert wide["dtype"] == ("float32", "bfloat16, float16 with kernel xformers_flash")


def test_the_cpu_is_refused_by_site_before_anything_is_patched(fresh):
    model = led()
    with pytest.raises(attnzoo.BackendRefusedError) as caught:
        attnzoo.patch(model, "xformers")
    sites = {verdict.site for verdict in attnzoo.explain(model, "xformers")}
    assert set(caught.value.refusals) == sites
    for site, reasons in caught.value.refusals.items():
        by_field = {reason.field: reason for reason in reasons}
        assert (by_field["device"].got, by_field["device"].allowed) == ("cpu", "cuda")
        assert f"backends that support it: '{caught.value.alternatives[site][0]}'" in str(caught.value)
        assert {"eager", "sdpa"} <= set(caught.value.alternatives[site])
    assert not any("forward" in vars(module) for module in model.modules())


def test_it_is_unavailable_without_a_device_and_names_what_to_install(fresh, monkeypatch):
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    missing = "xformers is not installed: pip install xformers"
    fresh.setattr(xformers_kernels, "import_package", lambda *_: (None, missing))
    reason = attnzoo.backends()["xformers"].reason
    assert reason.startswith(f"torch {torch.__version__}") and reason.endswith(missing)


# What is missing


def plant(monkeypatch, tmp_path, text):
    (tmp_path / "xformers" / "ops").mkdir(parents=True)
    (tmp_path / "xformers" / "__init__.py").write_text("")
    (tmp_path / "xformers" / "ops" / "__init__.py").write_text("")
    (tmp_path / "xformers" / "ops" / "fmha.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "raise RuntimeError('built for another torch')",
            "xformers cannot be imported: RuntimeError: built for another torch",
        ),
        ("raise SystemExit(3)", "xformers cannot be imported: SystemExit: 3"),
        ("def memory_efficient_attention(q): ...", "changed the parameters of memory_efficient_attention to q"),
    ],
    ids=["error", "system exit", "drift"],
)
def test_a_broken_package_only_makes_the_backend_unavailable(fresh, tmp_path, text, why):
    plant(fresh, tmp_path, text)
    assert why in attnzoo.backends()["xformers"].reason
    (line,) = [line for line in doctor.examine() if line.kind == "backend" and line.name == "xformers"]
    assert not line.ok and why in line.detail
    model = gpt_neox()
    with attnzoo.patch(model, "sdpa"):
        model(input_ids=torch.arange(3, 9)[None])


def test_operators_that_were_not_built_are_skipped(xformers, monkeypatch):
    monkeypatch.setattr(xformers.flash.FwOp, "BUILT", False)
    assert "no working operator 'flash'" in xformers_kernels.XformersFlashKernel.unavailable()
    assert XformersBackend().run(attention(attnzoo.Causal())).kernel == "xformers_cutlass"
    monkeypatch.setattr(xformers.cutlass.BwOp, "BUILT", False)
    xformers_kernels._operator_unavailable.cache_clear()
    assert "no working operator 'cutlass'" in XformersBackend.unavailable()


def test_an_operator_whose_check_raises_is_skipped(xformers, monkeypatch):
    def broken(cls):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(xformers.flash.FwOp, "is_available", classmethod(broken))
    why = xformers_kernels.XformersFlashKernel.unavailable()
    assert "'flash' fails its check: OSError: libcudart" in why
    assert XformersBackend().run(attention(attnzoo.Causal())).kernel == "xformers_cutlass"


NOT_BUILT = "xFormers wasn't build with CUDA support"


def test_a_wheel_whose_extension_does_not_load_is_unavailable(xformers, monkeypatch):
    """The operators of the wheel report that they are available, but every call raises."""
    monkeypatch.setattr(operators().EXTENSION, "loaded", False)
    assert xformers.flash.FwOp.is_available() and xformers.cutlass.BwOp.is_available()
    with pytest.raises(ValueError, match=NOT_BUILT):
        XformersBackend().run(attention(attnzoo.Causal()))
    info, model = attnzoo.backends()["xformers"], gpt_neox().half()
    assert not info.available and NOT_BUILT in info.reason and len(info.reason) < 400
    (line,) = [line for line in doctor.examine() if line.kind == "backend" and line.name == "xformers"]
    assert not line.ok and NOT_BUILT in line.detail
    explained = attnzoo.explain(model, "xformers")
    assert all(any(NOT_BUILT in reason.got for reason in verdict.refusals) for verdict in explained)
    with pytest.raises(attnzoo.BackendRefusedError, match=NOT_BUILT) as caught:
        attnzoo.patch(model, "xformers")
    assert not any("xformers" in names for names in caught.value.alternatives.values())
    named = XformersBackend(kernel="xformers_cutlass")
    assert NOT_BUILT in refusals(named)["kernel"][0]


def operators():
    return importlib.import_module("xformers.ops.fmha.operators")


@pytest.mark.parametrize("half", ["FwOp", "BwOp"])
def test_an_operator_that_does_not_support_a_small_example_is_skipped(xformers, monkeypatch, half):
    monkeypatch.setattr(
        getattr(xformers.flash, half), "not_supported_reasons", classmethod(lambda *_: ["it is Monday"])
    )
    assert "'flash' does not run here: it is Monday" in xformers_kernels.XformersFlashKernel.unavailable()
    assert XformersBackend.unavailable() is None
    assert XformersBackend().run(attention(attnzoo.Causal())).kernel == "xformers_cutlass"


def test_the_small_example_is_checked_once(xformers, monkeypatch):
    examples = []
    monkeypatch.setattr(
        xformers.flash.FwOp, "not_supported_reasons", classmethod(lambda _, d: examples.append(d) or [])
    )
    for _ in range(3):
        assert xformers_kernels.XformersFlashKernel.unavailable() is None
    # one check of each class: BwOp inherits from FwOp in the fake
    assert len(examples) == 2 and examples[0] is examples[1]
    assert (tuple(examples[0].query.shape), examples[0].scale) == ((1, 8, 1, 32), 1.0)
    assert type(examples[0].attn_bias).__name__ == "BlockDiagonalMask"


def test_long_reasons_are_shortened(xformers, monkeypatch):
    long = classmethod(lambda *_: ["word " * 100])
    for operator in (xformers.flash, xformers.cutlass):
        monkeypatch.setattr(operator.FwOp, "not_supported_reasons", long)
    assert len(XformersBackend.unavailable()) < 400


def test_without_a_device_cuda_is_not_initialised(xformers, monkeypatch):
    monkeypatch.setattr(xformers_kernels, "example_device", kernels.example_device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: pytest.fail("CUDA was examples for"))
    monkeypatch.setattr(xformers.flash.FwOp, "not_supported_reasons", lambda _: pytest.fail("an example was made"))
    assert xformers_kernels.XformersFlashKernel.unavailable() is None  # the backend reports a missing device
    assert not torch.cuda.is_initialized()


def test_deterministic_algorithms_skip_an_operator_that_is_not(xformers):
    training = attention(attnzoo.Causal(), grad=True)
    assert XformersBackend().run(training).kernel == "xformers_flash"
    torch.use_deterministic_algorithms(True)
    try:
        result = XformersBackend().run(training)
        result.output.backward(torch.ones_like(result.output).contiguous())
        assert result.kernel == "xformers_cutlass"
    finally:
        torch.use_deterministic_algorithms(False)
    assert XformersBackend().run(training).kernel == "xformers_flash"


def test_a_device_too_new_for_an_operator_is_a_reason(xformers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert "capability (10, 0) (too new)" in xformers_kernels.XformersCutlassKernel.unavailable()
    assert xformers_kernels.XformersFlashKernel.unavailable() is None


def test_the_fake_has_the_expected_signatures(xformers):
    for name, names in xformers_kernels._FUNCTIONS.items():
        assert tuple(inspect.signature(getattr(xformers, name)).parameters)[: len(names)] == names


# Models


def test_led_trains_and_infers(xformers):
    report = attnzoo.verify(led().half(), led_inputs(40, "every", batch=4), "xformers")
    assert report.ok, str(report)
    assert {site.kernel for site in report.sites} <= {"xformers_flash", "xformers_cutlass"}
