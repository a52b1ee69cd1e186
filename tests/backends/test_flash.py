"""``flash_attention_2`` on fake kernels: every attention it takes against the oracle, and what reaches the kernels."""

import functools
import inspect
import sys
from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo import doctor, error_rule, testing
from attnzoo.backends import flash_attn_kernel, packed, varlen_kernel
from attnzoo.backends.flash import FlashBackend
from attnzoo.patterns import SortedChunks
from attnzoo.testing import Case
from attnzoo.verification import check_site

from ..models.zoo import (
    causal_inputs,
    causal_prompt,
    gpt_bigcode,
    gpt_neox,
    led,
    led_inputs,
    longformer,
    longformer_inputs,
    longt5,
    reformer,
)

HALF = torch.float16


def heads(length, count=2, dim=8, dtype=HALF, seed=0, grad=False):
    random = torch.Generator().manual_seed(seed)
    return torch.randn((2, count, length, dim), generator=random).to(dtype).requires_grad_(grad)


def attention(pattern, q_len=20, kv_len=20, dim=8, kv_heads=2, key_mask=None, query_mask=None, scale=0.3, grad=False):
    key, value = (heads(kv_len, kv_heads, dim, seed=seed, grad=grad) for seed in (1, 2))
    segment = attnzoo.Segment(key, value, pattern, key_mask=key_mask)
    return attnzoo.Attention(heads(q_len, 2, dim, grad=grad), (segment,), scale, query_mask=query_mask)


def real(*lengths, of=20):
    return torch.arange(of)[None] < torch.tensor(lengths)[:, None]


def agrees(whole, backend):
    report = check_site("case", whole, backend, grad=True, max_rows=1 << 30)
    assert all(one.ok for one in report.checks), str(report.checks)
    return report.kernel


# --- against the oracle


def test_the_kit_on_flash_attn(flash_attn):
    report = testing.check_backend(FlashBackend(), dtypes=(HALF, torch.float64))
    assert {outcome.case.dtype for outcome in report.outcomes if not outcome.refused} == {HALF}
    taken = {type(outcome.case.pattern) for outcome in report.outcomes if not outcome.refused}
    assert taken == FlashBackend.capabilities.patterns
    assert any(outcome.case.dropout and not outcome.refused for outcome in report.outcomes)


def test_the_kit_on_torchs_kernels(varlen):
    report = testing.check_backend(FlashBackend(kernel="varlen"), dtypes=(HALF,))
    assert not any(outcome.case.dropout and not outcome.refused for outcome in report.outcomes)
    assert {"forward", "backward"} == {name for name, _ in varlen}


@pytest.mark.parametrize("pattern", [attnzoo.Window(9, 0), SortedChunks(8, 1, 0, causal=True)], ids=str)
def test_long_inputs_in_bfloat16(flash_attn, pattern):
    mask = "keys" if isinstance(pattern, SortedChunks) else "globals"
    case = Case(torch.bfloat16, pattern, mask, kv_heads=2, q_len=300, kv_len=300)
    assert not testing.run_case(FlashBackend(), case).failure


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["varlen", "flash_attn"])
def test_the_kit_on_the_real_kernels(kernel, dtype):
    lacking = {one.name: one.unavailable() for one in FlashBackend.kernels}[kernel]
    if lacking:
        pytest.skip(lacking)
    testing.check_backend(FlashBackend(kernel=kernel), device="cuda", dtypes=(dtype,))


@pytest.mark.parametrize("scale", [2.0**-14, 1e-3, 0.25, 1.0, 8.0])
def test_hidden_keys_have_no_weight_whatever_the_scale(flash_attn, scale):
    holes = torch.arange(20)[None].expand(2, 20) % 3 != 1
    whole = attention(attnzoo.Window(2, 1), key_mask=holes, scale=scale)
    assert packed.plan(whole).hidden[0] is not None
    agrees(whole, FlashBackend())
    query, (segment,) = whole.query, whole.segments
    shouting = replace(segment, value=segment.value.masked_fill(~holes[:, None, :, None], 60000.0))
    loud = FlashBackend().run(replace(whole, query=query, segments=(shouting,))).output
    assert torch.equal(loud, FlashBackend().run(whole).output)


def test_segments_that_share_keys_hide_each_its_own(flash_attn):
    whole = attention(attnzoo.Window(2, 2), key_mask=torch.arange(20)[None].expand(2, 20) % 3 != 1)
    (segment,) = whole.segments
    others = [replace(segment, pattern=attnzoo.Window(6, 0), key_mask=mask)
              for mask in (None, torch.arange(20)[None].expand(2, 20) % 5 != 1)]  # fmt: skip
    whole = replace(whole, segments=(segment, *others))
    agrees(whole, FlashBackend())
    apart = whole.with_tensors(tuple(tensor.clone() for tensor in whole.tensors()))
    assert torch.equal(FlashBackend().run(whole).output, FlashBackend().run(apart).output)


def test_the_backward_of_a_union_drops_what_its_forward_dropped(flash_attn):
    whole = attention(attnzoo.Window(4, 4), grad=True)
    (window,) = whole.segments
    globals_ = attnzoo.Segment(heads(3, seed=7, grad=True), heads(3, seed=8, grad=True))
    whole = replace(whole, segments=(window, globals_), dropout=0.4)
    wide = attnzoo.Attention(*padded_to(whole, 24), whole.scale, 0.4)

    def run(one):
        torch.manual_seed(3)
        return FlashBackend().run(one).output

    factors = (run(wide).detach()[..., :23] != 0).double() / 0.6
    cotangent = torch.randn(whole.query.shape, dtype=torch.float64)

    def dropped(tensors):
        """The same by definition, in the tensors' dtype, with the same weights dropped."""
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
    """Query and segments with room for one-hot values: the output is the softmax weights."""
    pad = torch.nn.functional.pad
    one_hot, segments, start = torch.eye(dim, dtype=HALF), [], 0
    for segment in whole.segments:
        rows = one_hot[start : start + segment.kv_len].expand(2, 2, -1, -1)
        segments.append(replace(segment, key=pad(segment.key.detach(), (0, dim - 8)), value=rows.contiguous()))
        start += segment.kv_len
    return pad(whole.query.detach(), (0, dim - 8)), tuple(segments)


def test_a_row_that_sees_hidden_keys_alone_gives_zero_or_what_is_said(flash_attn):
    nearly = torch.zeros((2, 20), dtype=torch.bool)
    nearly[:, [0, 19]] = True
    whole = attention(attnzoo.Window(2, 1), key_mask=nearly)
    output = FlashBackend().run(whole).output
    assert (output[:, :, 5:15] == 0).all() and (output[:, :, 0] != 0).all()
    own = replace(whole, empty=heads(20, seed=5))
    assert torch.equal(FlashBackend().run(own).output[:, :, 5:15], own.empty[:, :, 5:15])
    agrees(own, FlashBackend())


@pytest.mark.parametrize("kernel", ["flash_attn", "varlen"])
def test_a_plan_made_in_inference_mode_is_not_trained_with(flash_attn, varlen, kernel):
    backend, mask = FlashBackend(kernel=kernel), real(13, 7)
    for masks in (dict(key_mask=mask, query_mask=mask), {}):
        with torch.inference_mode():
            backend.run(attention(attnzoo.Window(4, 4), **masks))
        agrees(attention(attnzoo.Window(4, 4), **masks, grad=True), backend)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_that_is_not_positive(flash_attn, scale):
    agrees(attention(attnzoo.Causal(), scale=scale), FlashBackend())


def test_a_scale_too_small_to_hide_keys_by_is_refused(flash_attn):
    holes = torch.arange(20)[None].expand(2, 20) != 9
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"scale: got 1e-08; allowed: at least 2\*\*-19"):
        FlashBackend().run(attention(attnzoo.Causal(), key_mask=holes, scale=1e-8))


def test_deterministic_algorithms_are_asked_for(flash_attn, monkeypatch):
    asked, original = [], flash_attn.flash_attn_varlen_func

    @functools.wraps(original)
    def noting(*args, **kwargs):
        asked.append(kwargs["deterministic"])
        return original(*args, **kwargs)

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", noting)
    FlashBackend().run(attention(attnzoo.Full()))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    FlashBackend().run(attention(attnzoo.Full()))
    assert asked == [False, True]


# --- what reaches the kernels


def ran(flash_attn, whole):
    flash_attn.CALLS.clear()
    result = FlashBackend().run(whole)
    assert result.kernel == "flash_attn"
    return [(name, given) for name, given in flash_attn.CALLS], result.output


def test_one_call_is_one_call_of_the_public_function(flash_attn):
    for pattern, causal, window in (
        (attnzoo.Full(), False, (-1, -1)),
        (attnzoo.Causal(), True, (-1, 0)),
        (attnzoo.Window(4, 3), False, (4, 3)),
        (attnzoo.Window(4, 0), False, (4, 0)),
    ):
        [(name, given)], _ = ran(flash_attn, attention(pattern))
        assert name == "func" and given["causal"] == causal and given["window"] == window
        assert given["cu_q"].tolist() == given["cu_k"].tolist() == [0, 20, 40]


def test_padding_is_packed_away(flash_attn):
    mask = real(13, 7)
    for pattern in (attnzoo.Full(), attnzoo.Causal(), attnzoo.Window(4, 4)):
        [(name, given)], _ = ran(flash_attn, attention(pattern, key_mask=mask, query_mask=mask))
        assert name == "func"
        assert given["cu_q"].tolist() == given["cu_k"].tolist() == [0, 13, 20]
        assert given["q"].shape[0] == given["k"].shape[0] == 20


@pytest.mark.parametrize("pattern", [attnzoo.Causal(), attnzoo.Window(9, 7), attnzoo.Window(2, 9)], ids=str)
@pytest.mark.parametrize("kernel", [None, "varlen"])
def test_a_sample_shorter_than_half_of_the_batch_keeps_its_extents(flash_attn, varlen, pattern, kernel):
    """Kernels take an extent for none that is as long as the keys are: see :func:`calls._cut`."""
    agrees(attention(pattern, key_mask=real(6, 3)), FlashBackend(kernel=kernel))
    agrees(attention(pattern, key_mask=real(20, 6).flip(1)), FlashBackend(kernel=kernel))


def test_a_sample_of_padding_is_in_no_call(flash_attn):
    [(_, given)], output = ran(flash_attn, attention(attnzoo.Full(), key_mask=real(20, 0)))
    assert given["cu_q"].tolist() == [0, 20]
    assert (output[1] == 0).all()


def test_key_heads_are_not_repeated(flash_attn):
    [(_, given)], _ = ran(flash_attn, attention(attnzoo.Causal(), kv_heads=1))
    assert given["q"].shape[1:] == (2, 8) and given["k"].shape[1:] == (1, 8)


def test_an_odd_head_dim_is_padded_and_the_scale_kept(flash_attn):
    whole = attention(attnzoo.Full(), dim=12)
    [(_, given)], output = ran(flash_attn, whole)
    assert given["q"].shape[2] == 16 and output.shape[3] == 12
    agrees(whole, FlashBackend())


def test_nothing_is_copied_that_need_not_be(flash_attn):
    query, key, value = (torch.randn(2, 20, 2, 8, dtype=HALF).transpose(1, 2) for _ in range(3))
    whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, attnzoo.Causal()),), 1.0)
    [(_, given)], _ = ran(flash_attn, whole)
    assert given["q"].data_ptr() == query.data_ptr() and given["k"].data_ptr() == key.data_ptr()


@pytest.mark.parametrize("width", [9, 16])
def test_what_does_not_lie_on_16_bytes_is_copied(flash_attn, width):
    query, key, value = (torch.randn(2, 20, 2, width).half()[..., 1:9].transpose(1, 2) for _ in range(3))
    crooked = attnzoo.Attention(query, (attnzoo.Segment(key, value, attnzoo.Causal()),), 0.3)
    straight = crooked.with_tensors(tuple(tensor.contiguous() for tensor in crooked.tensors()))
    assert torch.equal(FlashBackend().run(crooked).output, FlashBackend().run(straight).output)


def test_where_nothing_is_seen_no_kernel_runs(flash_attn):
    whole = attention(attnzoo.Causal(), key_mask=real(0, 0), grad=True)
    flash_attn.CALLS.clear()
    result = FlashBackend().run(whole)
    result.output.sum().backward()
    assert (result.kernel, flash_attn.CALLS) == ("none", [])
    assert (result.output == 0).all() and (whole.query.grad == 0).all()


def test_window_and_globals_are_united_and_each_backward_gets_the_final_lse(flash_attn):
    whole = attention(attnzoo.Window(4, 4), grad=True)
    (window,) = whole.segments
    globals_ = attnzoo.Segment(window.key[:, :, :2], window.value[:, :, :2])
    whole = replace(whole, segments=(window, globals_))
    calls, output = ran(flash_attn, whole)
    assert [(name, given["window"]) for name, given in calls] == [("forward", (4, 4)), ("forward", (-1, -1))]
    assert [given["cu_k"].tolist() for _, given in calls] == [[0, 20, 40], [0, 2, 4]]
    flash_attn.CALLS.clear()
    output.sum().backward()
    first, second = (given for name, given in flash_attn.CALLS if name == "backward")
    assert torch.equal(first["lse"], second["lse"])
    keys = torch.cat([window.key, globals_.key], dim=2).float()
    scores = whole.query.float() @ keys.transpose(-1, -2) * whole.scale
    seen = torch.cat([(torch.arange(20)[:, None] - torch.arange(20)).abs() <= 4, torch.ones(20, 2).bool()], dim=1)
    true = scores.masked_fill(~seen, -torch.inf).logsumexp(-1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(first["lse"], true, atol=1e-5, rtol=0.0)


def test_lsh_rounds_are_causal_calls_that_meet_by_token(flash_attn):
    whole = Case(HALF, SortedChunks(8, 1, 0, causal=True), q_len=16, kv_len=16, grad=False).attention()
    calls, _ = ran(flash_attn, whole)
    assert [given["causal"] for _, given in calls] == [True] * len(calls)
    assert {given["q"].shape[1] for _, given in calls} == {1}  # each head sorts its own
    both = Case(HALF, SortedChunks(8, 1, 0), q_len=16, kv_len=16, grad=False).attention()
    assert len(ran(flash_attn, both)[0]) == 2 * len(calls)  # tokens before its own, and after it


def test_sorted_keys_beside_others(flash_attn):
    """The spare row of sorted keys is in no other call: the fake checks that lengths add up to the rows given."""
    whole = Case(HALF, SortedChunks(8, 1, 0, causal=True), q_len=16, kv_len=16).attention()
    few, every = (torch.randn((*whole.query.shape[:2], n, whole.head_dim)).to(HALF) for n in (5, 16))
    others = (attnzoo.Segment(few, few), attnzoo.Segment(every, every, attnzoo.Causal()))
    agrees(attnzoo.Attention(whole.query, (*whole.segments, *others), whole.scale), FlashBackend())


def test_the_kernel_is_the_packages_if_it_is_there_and_torchs_if_not(flash_attn, varlen, monkeypatch):
    whole = attention(attnzoo.Causal())
    assert FlashBackend().run(whole).kernel == "flash_attn"
    assert FlashBackend(kernel="varlen").run(whole).kernel == "varlen"
    monkeypatch.setattr(flash_attn_kernel.FlashAttnKernel, "unavailable", classmethod(lambda cls: "gone"))
    assert FlashBackend().run(whole).kernel == "varlen"


# --- what is refused


def refusals(backend=None, **changes):
    case = Case(**{**dict(dtype=HALF, grad=False), **changes})
    found = (backend or FlashBackend()).refusals(case.attention().request(case.probabilities))
    return {refusal.field: (refusal.got, refusal.allowed) for refusal in found}


def test_reasons_say_what_was_got_and_what_is_allowed(flash_attn):
    assert refusals() == {}
    assert refusals(dtype=torch.float32)["dtype"] == ("float32", "bfloat16, float16, or torch.autocast to one of them")
    assert refusals(bias="relative")["bias"] == ("relative", "none")
    assert refusals(mask="dense")["mask"] == ("requested", "no dense mask")
    assert refusals(probabilities=True)["attention probabilities"] == ("requested", "output_attentions=False")


def wide(dim, pattern, key_mask):
    segment = attnzoo.SegmentRequest(pattern, 2, key_mask=key_mask)
    request = attnzoo.Request("cpu", HALF, 2, dim, 8, (segment,))
    return {refusal.field: (refusal.got, refusal.allowed) for refusal in FlashBackend().refusals(request)}


def test_wide_heads(flash_attn):
    assert not wide(256, attnzoo.Causal(), False) and not wide(256, attnzoo.Full(), True)
    assert wide(264, attnzoo.Full(), False)["head_dim"] == ("264", "at most 256")
    assert wide(256, attnzoo.Causal(), True)["head_dim"] == ("256", "at most 255, and one more to hide keys")


def test_torchs_kernels_have_no_dropout(varlen):
    backend = FlashBackend(kernel="varlen")
    assert refusals(backend, dropout=0.1) == {"dropout": ("requested of varlen", "dropout=0.0")}


def test_the_cpu_is_refused_where_it_is_no_fake(fresh):
    assert refusals()["device"] == ("cpu", "cuda")


def test_an_unknown_kernel(fresh):
    with pytest.raises(
        attnzoo.InvalidArgumentError, match=r"kernel: got 'fa3'; allowed: None, or one of \['flash_attn'"
    ):
        FlashBackend(kernel="fa3")


def test_a_kernel_asked_for_by_name_that_is_not_there(on_cpu, monkeypatch):
    monkeypatch.setattr(flash_attn_kernel.FlashAttnKernel, "unavailable", classmethod(lambda cls: "gone"))
    assert refusals(FlashBackend(kernel="flash_attn")) == {"kernel": ("'flash_attn': gone", "kernel=None")}


# --- what is missing


def plant(monkeypatch, tmp_path, text):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", "ImportError: libcudart.so.12: cannot open"),
        ("raise SystemExit('no')", "SystemExit: no"),
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        (
            "def flash_attn_varlen_func(q, keys): ...",
            "flash_attn changed the parameters of flash_attn_varlen_func to q, ",
        ),
        ("", "flash_attn has no flash_attn_varlen_func"),
        ("flash_attn_varlen_func = max", "flash_attn's flash_attn_varlen_func does not tell its parameters"),
    ],
    ids=["import error", "system exit", "dependency", "drift", "empty", "no signature"],
)
def test_a_broken_package_is_a_reason_and_breaks_nothing(fresh, tmp_path, monkeypatch, text, why):
    plant(fresh, tmp_path, text)
    assert why in flash_attn_kernel.FlashAttnKernel.unavailable()
    fresh.setattr(varlen_kernel, "import_package", lambda *_: (None, "gone"))
    assert why in attnzoo.backends()["flash_attention_2"].reason
    (line,) = [found for found in doctor.examine() if found.name.startswith("flash_attention_2")]
    assert not line.ok and why in line.detail
    assert attnzoo.backends()["sdpa"].available


class Nowhere:
    """Finds no flash_attn, whether there is one or not."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "flash_attn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_package_says_what_to_install(fresh):
    fresh.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])
    why = flash_attn_kernel.FlashAttnKernel.unavailable()
    assert why == "flash_attn is not installed: pip install flash-attn"


def test_an_old_torch_says_what_is_needed(fresh, monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert "varlen_attn has no scale, window_size: 2.11 is needed" in varlen_kernel.VarlenKernel.unavailable()


def test_without_a_device_the_backend_says_so(fresh):
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    info = attnzoo.backends()["flash_attention_2"]
    assert not info.available and f"torch {torch.__version__}" in info.reason and "CUDA" in info.reason


def test_an_old_device_is_told(fresh):
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.version, "cuda", "12.8")
    fresh.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    fresh.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert packed.no_device() == "Tesla T4 has compute capability 7.5; needed: 8.0"


@pytest.mark.parametrize("lost", [flash_attn_kernel._FORWARD, flash_attn_kernel._BACKWARD])
def test_without_the_private_functions_parts_are_refused_and_single_calls_run(flash_attn, monkeypatch, lost):
    monkeypatch.delattr(flash_attn, lost)
    backend = FlashBackend(kernel="flash_attn")
    assert refusals(backend, mask="globals")["segments"][0].endswith(f"has no {lost}")
    assert refusals(backend, pattern=attnzoo.Causal(), mask="keys")["segments"][1] == "one segment without a key mask"
    for query_mask in (None, real(20, 7)):  # several calls, but none that has to be united with another
        assert agrees(attention(attnzoo.Window(4, 4), query_mask=query_mask), FlashBackend()) == "flash_attn"
    assert not refusals(mask="globals")  # torch's kernels take those


def test_torchs_private_operators_are_what_is_relied_on():
    assert varlen_kernel._parts_unavailable() is None
    changed = flash_attn_kernel.drift(torch.ops.torch_attn, {"_varlen_attn": ("query", "keys")}, "torch")
    assert changed is not None and changed.startswith("torch changed the parameters of _varlen_attn to query, key, ")


def test_the_fake_has_the_signatures_that_are_guarded_for(flash_attn):
    for name, names in {**flash_attn_kernel._PARTS, "flash_attn_varlen_func": flash_attn_kernel._PUBLIC}.items():
        assert tuple(inspect.signature(getattr(flash_attn, name)).parameters)[: len(names)] == names


# --- models


def test_led_trains_and_infers_in_bfloat16(flash_attn):
    report = attnzoo.verify(led().bfloat16(), led_inputs(40, "every", batch=4), "flash")
    assert report.ok, str(report)
    assert {site.kernel for site in report.sites} == {"flash_attn"}


@pytest.mark.parametrize("build", [longformer, reformer, gpt_neox, gpt_bigcode], ids=lambda build: build.__name__)
def test_other_families_on_torchs_kernels(varlen, build):
    inputs = longformer_inputs(23, "left") if build is longformer else causal_inputs(23, "left")
    report = attnzoo.verify(build().bfloat16(), inputs, FlashBackend(kernel="varlen"))
    assert report.ok, str(report)
    assert {site.kernel for site in report.sites} == {"varlen"}


def test_autocast_decides_the_dtype_when_patching_and_when_running(flash_attn):
    model, inputs = gpt_neox(), dict(input_ids=torch.arange(3, 15)[None])
    with pytest.raises(attnzoo.BackendRefusedError, match=r"allowed: bfloat16, float16, or torch\.autocast"):
        attnzoo.patch(model, "flash")
    with torch.autocast("cpu", torch.bfloat16):
        handle = attnzoo.patch(model, "flash")
        model(**inputs).logits.sum().backward()
    assert handle.sites[0].calls == 1 and flash_attn.CALLS[-1][1]["q"].dtype == torch.bfloat16
    with pytest.raises(attnzoo.BackendRefusedError, match=r"gpt_neox\.layers\.0\.attention"):
        model(**inputs)


def test_queries_and_keys_that_the_model_left_in_float32_run_in_the_values_dtype(flash_attn, monkeypatch):
    model = gpt_neox().bfloat16()
    file = sys.modules[type(model).__module__]
    rotate = file.apply_rotary_pos_emb
    monkeypatch.setattr(file, "apply_rotary_pos_emb", lambda *args: tuple(one.float() for one in rotate(*args)))
    with attnzoo.patch(model, "flash"):
        model(torch.arange(3, 15)[None], use_cache=False)
    assert flash_attn.CALLS[-1][1]["q"].dtype == torch.bfloat16


@pytest.mark.parametrize("build", [reformer, gpt_neox, gpt_bigcode], ids=lambda build: build.__name__)
def test_decoders_generate_the_oracles_tokens(flash_attn, build):
    model, inputs = build().half(), causal_prompt("left")
    asked = dict(max_new_tokens=6, do_sample=False)
    with attnzoo.patch(model, "eager"):
        expected = model.generate(**inputs, **asked)
    with attnzoo.patch(model, "flash") as handle:
        assert torch.equal(model.generate(**inputs, **asked), expected)
    assert {site.kernel for site in handle.sites} == {"flash_attn"}


def test_a_relative_bias_is_refused_by_site_before_anything_is_patched(fresh):
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    model = longt5()
    with pytest.raises(attnzoo.BackendRefusedError) as caught:
        attnzoo.patch(model, "flash")
    site = "encoder.block.0.layer.0.LocalSelfAttention"
    reasons = {refusal.field: refusal for refusal in caught.value.refusals[site]}
    assert {"availability", "bias", "device", "dtype"} <= set(reasons)
    assert (reasons["bias"].got, reasons["bias"].allowed) == ("relative", "none")
    assert "CUDA" in reasons["availability"].got
    assert {"eager", "sdpa"} <= set(caught.value.alternatives[site])
    assert "flash_attention_2" not in caught.value.alternatives[site]
    assert not any("forward" in vars(module) for module in model.modules())
    told = {verdict.site: {one.field for one in verdict.refusals} for verdict in attnzoo.explain(model, "flash")}
    assert {"availability", "bias", "device", "dtype"} <= told[site]
