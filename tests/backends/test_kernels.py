"""``sdpa`` reports the kernel that ran. PyTorch's profiler shows which kernel ran, whatever the backend reports."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch.nn.attention import SDPBackend

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.backends.sdpa import backend as sdpa
from attnzoo.backends.sdpa import flash_cpu, math_blocks
from attnzoo.benchmarks.witness import claimed, false_claims, witness
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.patterns import SortedChunks
from attnzoo.testing import AttentionCase, cases

# A case for every way sdpa runs on the CPU, with the reported kernel and the kernels that the profiler must see.
WAYS = {
    "one call": (AttentionCase(), "flash", {"flash"}),
    "one causal call": (AttentionCase(pattern=attnzoo.Causal()), "flash", {"flash"}),
    "one masked call": (AttentionCase(mask="keys"), "flash", {"flash"}),
    "one call with dropout": (AttentionCase(dropout=0.25), "math", {"math"}),
    "one call, uneven": (AttentionCase(uneven=True), "math", {"math"}),
    "blocks united by lse": (AttentionCase(pattern=attnzoo.Window(5, 3)), flash_cpu.KERNEL, {"flash"}),
    "segments united by lse": (
        AttentionCase(pattern=attnzoo.Window(5, 3), mask="globals"),
        flash_cpu.KERNEL,
        {"flash"},
    ),
    "a trained bias": (AttentionCase(bias="trained relative"), flash_cpu.KERNEL, {"flash"}),
    "sorted queries": (AttentionCase(pattern=SortedChunks(8, 1, 0, causal=True)), flash_cpu.KERNEL, {"flash"}),
    "blocks with dropout": (AttentionCase(pattern=attnzoo.Window(5, 3), dropout=0.25), "math", {"math"}),
    "sorted queries with dropout": (
        AttentionCase(pattern=SortedChunks(8, 1, 0, causal=True), dropout=0.25),
        math_blocks.KERNEL,
        set(),
    ),
}


def judge(backend, case, device="cpu"):
    """Return the kernel that a backend reports for a case. Raise unless exactly the reported kernels ran."""
    attention = case.attention(device)
    with witness() as ran:
        kernel = execute(backend, attention).kernel
    assert claimed([kernel]) == set(ran), f"{case}: reported {kernel}, ran {dict(ran)}"
    return kernel


@pytest.mark.parametrize("way", WAYS)
def test_every_way_reports_the_kernel_that_ran(way):
    case, kernel, ran = WAYS[way]
    assert judge(sdpa.SdpaBackend(), case) == kernel
    assert claimed([kernel]) == ran


def test_every_case_of_the_kit_reports_the_kernel_that_ran(device):
    backend, judged = sdpa.SdpaBackend(), set()
    for case in cases((torch.float32,)):
        telling = case.q_len < 100 and case.kv_heads == 4 and case.bias in ("none", "trained relative")
        if telling and not registry.refusals(backend, case.attention(device).request(case.probabilities)):
            judged |= {judge(backend, case, device)}
    assert device != "cpu" or judged == {"flash", "math", flash_cpu.KERNEL, math_blocks.KERNEL}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_reports_the_kernel_that_ran_on_cuda(dtype):
    for case, _, _ in WAYS.values():
        judge(sdpa.SdpaBackend(), AttentionCase(**{**vars(case), "dtype": dtype}), "cuda")


def public_calls(monkeypatch):
    """Let every kernel run by a public call, as in a PyTorch without the operator of the CPU kernel."""
    monkeypatch.setattr(flash_cpu, "unavailable", lambda: "this test wants public calls")


@pytest.mark.filterwarnings("ignore:Flash attention kernel", "ignore:Both fused kernels")
@pytest.mark.parametrize("public", [True, False])
def test_a_kernel_that_cannot_run_raises(monkeypatch, public):
    """The kernel is enforced, so PyTorch cannot choose another kernel."""
    monkeypatch.setattr(sdpa, "_kernel", lambda *args: SDPBackend.FLASH_ATTENTION)
    if public:
        public_calls(monkeypatch)
    with pytest.raises(RuntimeError, match="No available kernel" if public else "dropout"):
        execute(sdpa.SdpaBackend(), AttentionCase(dropout=0.25).attention())


@pytest.mark.parametrize("way", WAYS)
def test_the_default_kernel_changes_no_switches(monkeypatch, way):
    """The switches are global: models in other threads would see the change."""
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda kernel: pytest.fail(f"switched to {kernel}"))
    execute(sdpa.SdpaBackend(), WAYS[way][0].attention())


CALLS = {
    "no mask": AttentionCase(),
    "causal": AttentionCase(pattern=attnzoo.Causal(), kv_heads=2),
    "key mask": AttentionCase(torch.bfloat16, mask="keys"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_the_operator_computes_what_the_public_call_computes(monkeypatch, case, grad):
    """Outputs and gradients are equal bit for bit."""

    def run():
        whole = case.attention()
        leaves = tuple(tensor.detach().requires_grad_(grad) for tensor in whole.tensors())
        output = execute(sdpa.SdpaBackend(), whole.with_tensors(leaves)).output
        return (output, *(torch.autograd.grad(output.float().square().sum(), leaves) if grad else ()))

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        by_operator = run()
    public_calls(monkeypatch)
    for got, expected in zip(by_operator, run(), strict=True):
        assert torch.equal(got, expected)


def test_the_operator_does_not_depend_on_the_switches():
    """The operator needs no lock, although another thread may change the switches at any time."""
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        assert judge(sdpa.SdpaBackend(), AttentionCase()) == "flash"


@pytest.mark.parametrize("switching", [{0.0, 0.25}, {0.25}], ids=["all", "some"])
def test_a_call_that_changes_the_switches_runs_alone(monkeypatch, switching):
    """Two such calls at once would restore each other's changes, and kernels would stay off in all threads."""
    default, attend, within, met = sdpa._default_kernel, torch.nn.functional.scaled_dot_product_attention, [], []

    def choice(query, key, value, terms):
        return None if terms["dropout_p"] in switching else default(query, key, value, terms)

    def slowly(*args, **kwargs):
        within.append(kwargs["dropout_p"])
        met.append(tuple(within))
        time.sleep(0.02)
        met.append(tuple(within))
        within.remove(kwargs["dropout_p"])
        return attend(*args, **kwargs)

    public_calls(monkeypatch)
    monkeypatch.setattr(sdpa, "_default_kernel", choice)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", slowly)
    attentions = [AttentionCase(dropout=dropout).attention() for dropout in (0.0, 0.25) * 3]
    with ThreadPoolExecutor(len(attentions)) as threads:
        kernels = [done.kernel for done in threads.map(partial(execute, sdpa.SdpaBackend()), attentions)]
    assert kernels == ["flash", "math"] * 3
    assert not [calls for calls in met if len(calls) > 1 and switching & set(calls)]
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def test_a_key_mask_is_expanded_without_memory(monkeypatch):
    """PyTorch's CPU kernels convert a bool mask to an additive mask, and copy every row of an expanded mask."""
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    public_calls(monkeypatch)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    execute(sdpa.SdpaBackend(), AttentionCase(mask="keys").attention())
    (mask,) = masks
    assert mask.is_floating_point() and mask.shape[2] > 1 and mask.stride(2) == 0


# Wrong reports


def swapped(monkeypatch):
    names = {**sdpa._NAMES, SDPBackend.FLASH_ATTENTION: "math", SDPBackend.MATH: "flash"}
    monkeypatch.setattr(sdpa, "_NAMES", names)


def not_enforced(monkeypatch):
    """Report flash, but let PyTorch choose the kernel, which is math here."""
    public_calls(monkeypatch)
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda kernel: nullcontext())
    torch.backends.cuda.enable_flash_sdp(False)


def another_enforced(monkeypatch):
    public_calls(monkeypatch)
    torch.backends.cuda.enable_flash_sdp(False)
    enforce = sdpa.sdpa_kernel
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda kernel: enforce(SDPBackend.MATH))


def other_code(monkeypatch):
    """Run eager and report flash."""
    monkeypatch.setattr(sdpa, "_call", partial(_by_hand, sdpa._call))


def _by_hand(original, attention, *args):
    return EagerBackend().run(attention).output, None, "flash"


@pytest.mark.parametrize("report", [swapped, not_enforced, another_enforced, other_code])
def test_a_wrong_report_is_caught(monkeypatch, report):
    enabled = torch.backends.cuda.flash_sdp_enabled()
    try:
        report(monkeypatch)
        with pytest.raises(AssertionError, match=r"reported \w+, ran"):
            judge(sdpa.SdpaBackend(), AttentionCase())
    finally:
        torch.backends.cuda.enable_flash_sdp(enabled)


@dataclass(frozen=True)
class Renaming(attnzoo.Backend):
    """Silently runs another backend and reports this kernel."""

    name: ClassVar[str] = "renaming"
    capabilities: ClassVar[attnzoo.Capabilities] = EagerBackend.capabilities
    kernel: str = "flash"

    def run(self, attention, probabilities=False):
        return EagerBackend().run(attention)._replace(kernel=self.kernel)


@pytest.mark.parametrize("kernel", ["flash", "math", "flash_cpu", "efficient", "cudnn", "eager+flash"])
def test_a_silent_fallback_that_reports_a_kernel_is_caught(kernel):
    with pytest.raises(AssertionError, match="reported"):
        judge(Renaming(kernel), AttentionCase())
    assert judge(Renaming("renaming"), AttentionCase()) == "renaming"


# The witness


def test_the_witness_counts_every_call():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with witness() as ran:
        for _ in range(3):
            torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert ran == {"flash": 3, "math": 1}
    with witness() as ran:
        q.softmax(-1)
    assert not ran


def test_claims_are_read_from_the_reported_kernel():
    assert claimed(["flash+math", "eager", "flash_cpu"]) == {"flash", "math"}
    assert false_claims(["flash+math", "eager"], ["math"]) == ("flash",)
    assert false_claims(["math_blocks", "flex_cpu", "native"], []) == ()
