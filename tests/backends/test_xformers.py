"""``xformers`` on a fake package: every attention it takes against the oracle, and the biases that reach it."""

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
from tests.support.half import HALF, agrees, attention, real, refusals
from tests.support.models import gpt_neox, led, led_inputs

# --- against the oracle


@pytest.mark.parametrize("kernel", ["xformers_flash", "xformers_cutlass"])
def test_the_kit(xformers, kernel):
    report = testing.check_backend(XformersBackend(kernel=kernel), dtypes=(HALF, torch.float64))
    taken = {type(outcome.case.pattern) for outcome in report.outcomes if not outcome.refused}
    windows = {attnzoo.Window} if kernel == "xformers_cutlass" else set()
    assert taken == XformersBackend.capabilities.patterns - windows


def test_the_kit_in_float32(xformers):
    backend, cases = XformersBackend(), [case for case in testing.cases((torch.float32,)) if case.q_len < 700]
    outcomes = [testing.run_case(backend, case) for case in cases]
    assert not [str(outcome) for outcome in outcomes if outcome.failure]
    assert sum(not outcome.refused for outcome in outcomes) > 40


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["xformers_flash", "xformers_cutlass"])
def test_the_kit_on_the_real_kernels(kernel, dtype):
    lacking = {one.name: one.unavailable() for one in XformersBackend.kernels}[kernel]
    if lacking or (dtype == torch.float32 and kernel == "xformers_flash"):
        pytest.skip(lacking or "half precision only")
    testing.check_backend(XformersBackend(kernel=kernel), device="cuda", dtypes=(dtype,))


# --- what reaches xformers


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
def test_every_pattern_has_its_bias(xformers, pattern, bias):
    [(name, operator, given)], result = ran(xformers, attention(pattern))
    assert (name, operator, type(given).__name__) == ("attention", "fa2F@2.8.3", bias)
    assert result.kernel == "xformers_flash"
    agrees(attention(pattern), XformersBackend())


def test_padding_is_packed_away(xformers):
    mask = real(13, 7)
    [(_, _, bias)], _ = ran(xformers, attention(attnzoo.Causal(), key_mask=mask, query_mask=mask))
    assert bias.q_seqinfo.lengths == bias.k_seqinfo.lengths == [13, 7]


def test_two_sided_windows_take_runs_of_equal_lengths(xformers):
    mask = real(13, 7)
    calls, _ = ran(xformers, attention(attnzoo.Window(4, 3), key_mask=mask, query_mask=mask))
    assert [(bias.window_left, bias.window_right) for *_, bias in calls] == [(4, 3), (4, 3)]
    calls, _ = ran(xformers, attention(attnzoo.Window(4, 3)))
    assert len(calls) == 1


def test_window_and_globals_are_united_by_the_forms_that_return_lse(xformers):
    whole = attention(attnzoo.Window(4, 3), grad=True)
    (window,) = whole.segments
    whole = replace(whole, segments=(window, attnzoo.Segment(window.key[:, :, :2], window.value[:, :, :2])))
    calls, result = ran(xformers, whole)
    assert [(name, operator) for name, operator, _ in calls] == [("forward", "fa2F@2.8.3")] * 2
    xformers.CALLS.clear()
    result.output.sum().backward()
    assert [(name, operator) for name, operator, *_ in xformers.CALLS] == [("backward", "fa2B@2.8.3")] * 2
    agrees(whole, XformersBackend())


def test_float32_and_wide_heads_go_to_the_other_operator(xformers):
    for whole in (
        replace(AttentionCase(torch.float32, attnzoo.Causal(), grad=False).attention()),
        attention(attnzoo.Full(), dim=264),
    ):
        [(_, operator, _)], result = ran(xformers, whole)
        assert (operator, result.kernel) == ("cutlassF-pt", "xformers_cutlass")


def test_causal_attention_on_keys_that_end_early_needs_no_window(xformers):
    mask = real(13, 20)
    whole = attention(attnzoo.Causal(), key_mask=mask)
    calls, _ = ran(xformers, whole, XformersBackend(kernel="xformers_cutlass"))
    assert sorted(type(bias).__name__ for *_, bias in calls) == [
        "BlockDiagonalCausalFromBottomRightMask",
        "BlockDiagonalMask",
    ]
    agrees(whole, XformersBackend(kernel="xformers_cutlass"))


def test_key_heads_are_repeated_and_their_gradients_summed(xformers):
    whole = attention(attnzoo.Window(4, 3), kv_heads=1, grad=True)
    xformers.CALLS.clear()
    XformersBackend().run(whole)
    query, key, _ = xformers.CALLS[0][3]
    assert query.shape[2:] == key.shape[2:] == (2, 8)
    (segment,) = whole.segments
    parts = replace(whole, segments=(segment, attnzoo.Segment(segment.key[:, :, :2], segment.value[:, :, :2])))
    agrees(parts, XformersBackend())


# --- what is refused


def test_reasons(xformers):
    backend = XformersBackend()
    assert refusals(backend) == {}
    assert refusals(backend, dtype=torch.float64)["dtype"] == ("float64", "bfloat16, float16, float32")
    assert refusals(backend, bias="relative")["bias"] == ("relative", "none")
    assert refusals(backend, mask="dense")["mask"] == ("requested", "no dense mask")
    assert refusals(backend, dropout=0.1)["dropout"] == ("requested", "dropout=0.0")
    windows = refusals(XformersBackend(kernel="xformers_cutlass"), pattern=attnzoo.Window(3, 3))
    assert windows == {"pattern": ("Window(left=3, right=3, offset=None)", "no window with xformers_cutlass")}
    wide = refusals(backend, dtype=torch.float32, pattern=attnzoo.Window(3, 3))
    assert wide["dtype"] == ("float32", "bfloat16, float16 with xformers_flash")


def test_the_cpu_is_refused_by_site_before_anything_is_patched(fresh):
    model = led()
    with pytest.raises(attnzoo.BackendRefusedError) as caught:
        attnzoo.patch(model, "xformers")
    sites = {verdict.site for verdict in attnzoo.explain(model, "xformers")}
    assert set(caught.value.refusals) == sites
    for site, reasons in caught.value.refusals.items():
        told = {reason.field: reason for reason in reasons}
        assert (told["device"].got, told["device"].allowed) == ("cpu", "cuda")
        assert f"backends that support it: '{caught.value.alternatives[site][0]}'" in str(caught.value)
        assert {"eager", "sdpa"} <= set(caught.value.alternatives[site])
    assert not any("forward" in vars(module) for module in model.modules())


def test_without_a_device_it_says_so_and_what_to_install(fresh, monkeypatch):
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    missing = "xformers is not installed: pip install xformers"
    fresh.setattr(xformers_kernels, "import_package", lambda *_: (None, missing))
    reason = attnzoo.backends()["xformers"].reason
    assert reason.startswith(f"torch {torch.__version__}") and reason.endswith(missing)


# --- what is missing


def plant(monkeypatch, tmp_path, text):
    (tmp_path / "xformers" / "ops").mkdir(parents=True)
    (tmp_path / "xformers" / "__init__.py").write_text("")
    (tmp_path / "xformers" / "ops" / "__init__.py").write_text("")
    (tmp_path / "xformers" / "ops" / "fmha.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise RuntimeError('built for another torch')", "xformers is broken: RuntimeError: built for another torch"),
        ("raise SystemExit(3)", "xformers is broken: SystemExit: 3"),
        ("def memory_efficient_attention(q): ...", "changed the parameters of memory_efficient_attention to q"),
    ],
    ids=["error", "system exit", "drift"],
)
def test_a_broken_package_is_a_reason_and_breaks_nothing(fresh, tmp_path, text, why):
    plant(fresh, tmp_path, text)
    assert why in attnzoo.backends()["xformers"].reason
    (line,) = [found for found in doctor.examine() if found.kind == "backend" and found.name == "xformers"]
    assert not line.ok and why in line.detail
    model = gpt_neox()
    with attnzoo.patch(model, "sdpa"):
        model(input_ids=torch.arange(3, 9)[None])


def test_operators_that_were_not_built_are_passed_by(xformers, monkeypatch):
    monkeypatch.setattr(xformers.flash.FwOp, "BUILT", False)
    assert "no working operator 'flash'" in xformers_kernels.XformersFlashKernel.unavailable()
    assert XformersBackend().run(attention(attnzoo.Causal())).kernel == "xformers_cutlass"
    monkeypatch.setattr(xformers.cutlass.BwOp, "BUILT", False)
    xformers_kernels._operator_unavailable.cache_clear()
    assert "no working operator 'cutlass'" in XformersBackend.unavailable()


def test_an_operator_that_cannot_tell_whether_it_works_is_a_reason(xformers, monkeypatch):
    def broken(cls):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(xformers.flash.FwOp, "is_available", classmethod(broken))
    why = xformers_kernels.XformersFlashKernel.unavailable()
    assert "'flash' fails its check: OSError: libcudart" in why
    assert XformersBackend().run(attention(attnzoo.Causal())).kernel == "xformers_cutlass"


NOT_BUILT = "xFormers wasn't build with CUDA support"


def test_a_wheel_whose_extension_does_not_load_is_not_available(xformers, monkeypatch):
    """Its operators are registered and say they are available, and every call of them raises."""
    monkeypatch.setattr(operators().EXTENSION, "loaded", False)
    assert xformers.flash.FwOp.is_available() and xformers.cutlass.BwOp.is_available()
    with pytest.raises(ValueError, match=NOT_BUILT):
        XformersBackend().run(attention(attnzoo.Causal()))
    info, model = attnzoo.backends()["xformers"], gpt_neox().half()
    assert not info.available and NOT_BUILT in info.reason and len(info.reason) < 400
    (line,) = [found for found in doctor.examine() if found.kind == "backend" and found.name == "xformers"]
    assert not line.ok and NOT_BUILT in line.detail
    explained = attnzoo.explain(model, "xformers")
    assert all(any(NOT_BUILT in one.got for one in verdict.refusals) for verdict in explained)
    with pytest.raises(attnzoo.BackendRefusedError, match=NOT_BUILT) as caught:
        attnzoo.patch(model, "xformers")
    assert not any("xformers" in names for names in caught.value.alternatives.values())
    named = XformersBackend(kernel="xformers_cutlass")
    assert NOT_BUILT in refusals(named)["kernel"][0]


def operators():
    return importlib.import_module("xformers.ops.fmha.operators")


@pytest.mark.parametrize("half", ["FwOp", "BwOp"])
def test_an_operator_that_does_not_support_a_small_example_is_passed_by(xformers, monkeypatch, half):
    monkeypatch.setattr(
        getattr(xformers.flash, half), "not_supported_reasons", classmethod(lambda *_: ["it is Monday"])
    )
    assert "'flash' does not run here: it is Monday" in xformers_kernels.XformersFlashKernel.unavailable()
    assert XformersBackend.unavailable() is None
    assert XformersBackend().run(attention(attnzoo.Causal())).kernel == "xformers_cutlass"


def test_the_small_example_is_asked_for_once_and_in_the_form_of_every_call(xformers, monkeypatch):
    asked = []
    monkeypatch.setattr(xformers.flash.FwOp, "not_supported_reasons", classmethod(lambda _, d: asked.append(d) or []))
    for _ in range(3):
        assert xformers_kernels.XformersFlashKernel.unavailable() is None
    # BwOp inherits from FwOp in the fake: one question to each
    assert len(asked) == 2 and asked[0] is asked[1]
    assert (tuple(asked[0].query.shape), asked[0].scale) == ((1, 8, 1, 32), 1.0)
    assert type(asked[0].attn_bias).__name__ == "BlockDiagonalMask"


def test_long_reasons_are_cut(xformers, monkeypatch):
    long = classmethod(lambda *_: ["word " * 100])
    for operator in (xformers.flash, xformers.cutlass):
        monkeypatch.setattr(operator.FwOp, "not_supported_reasons", long)
    assert len(XformersBackend.unavailable()) < 400


def test_without_a_device_nothing_is_allocated_and_cuda_stays_untouched(xformers, monkeypatch):
    monkeypatch.setattr(xformers_kernels, "example_device", kernels.example_device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: pytest.fail("CUDA was asked for"))
    monkeypatch.setattr(xformers.flash.FwOp, "not_supported_reasons", lambda _: pytest.fail("an example was made"))
    assert xformers_kernels.XformersFlashKernel.unavailable() is None  # no device is the backend's own reason
    assert not torch.cuda.is_initialized()


def test_an_operator_that_is_not_deterministic_is_passed_by_where_it_has_to_be(xformers):
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


def test_a_device_too_new_for_an_operator(xformers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert "capability (10, 0) (too new)" in xformers_kernels.XformersCutlassKernel.unavailable()
    assert xformers_kernels.XformersFlashKernel.unavailable() is None


def test_the_fake_has_the_signatures_that_are_guarded_for(xformers):
    for name, names in xformers_kernels._FUNCTIONS.items():
        assert tuple(inspect.signature(getattr(xformers, name)).parameters)[: len(names)] == names


# --- models


def test_led_trains_and_infers(xformers):
    report = attnzoo.verify(led().half(), led_inputs(40, "every", batch=4), "xformers")
    assert report.ok, str(report)
    assert {site.kernel for site in report.sites} <= {"xformers_flash", "xformers_cutlass"}
