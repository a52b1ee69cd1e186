"""A call leaves no state behind and depends on none: PyTorch's defaults, layouts of gradients, locks after an error."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from attnzoo.backends.approximate.blocked_local import BlockedLocalBackend
from attnzoo.backends.approximate.lsh import LshBackend
from attnzoo.backends.eager import EagerBackend
from attnzoo.backends.sdpa import backend as sdpa
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.backends.varlen.xformers import XformersBackend
from attnzoo.functional import execute
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Causal, SortedChunks, Window
from attnzoo.testing import AttentionCase
from tests.support.half import HALF

KEYS = dict(mask="keys", kv_heads=2)
PACKED_CASES = (
    AttentionCase(HALF, Window(5, 3), mask="globals", kv_heads=2),
    AttentionCase(HALF, Causal(), **KEYS),
    AttentionCase(HALF, SortedChunks(8, 1, 1), mask="keys"),
)
WAYS = {
    "eager": (EagerBackend(), (AttentionCase(pattern=Window(5, 3), mask="globals"), AttentionCase(HALF, bias="dense"))),
    "cpu kernel": (
        SdpaBackend(),
        (
            AttentionCase(pattern=Window(5, 3), bias="trained relative", **KEYS),
            AttentionCase(pattern=Causal(), bias="trained dense"),
            AttentionCase(torch.bfloat16, SortedChunks(5, 1, 1), mask="keys"),
            AttentionCase(HALF, HashedChunks(5), **KEYS),
        ),
    ),
    "public calls": (
        SdpaBackend(),
        (
            AttentionCase(pattern=Window(5, 3), bias="relative", uneven=True, **KEYS),
            AttentionCase(pattern=Causal(offset=3), mask="dense", uneven=True),
        ),
    ),
    "math blocks": (
        SdpaBackend(),
        (AttentionCase(torch.bfloat16, SortedChunks(5, 1, 1), "keys", uneven=True),
         AttentionCase(pattern=HashedChunks(5), uneven=True, **KEYS)),
    ),
    "blocked-local": (BlockedLocalBackend(window=4, sinks=2, inner="sdpa"),
                      (AttentionCase(mask="dense"), AttentionCase(HALF, Causal(), "keys", "relative"))),
    "lsh": (LshBackend(num_hashes=2, chunk_length=4, num_buckets=4, inner="sdpa"),
            (AttentionCase(mask="dense"), AttentionCase(HALF, Causal(), **KEYS))),
    "flash_attention_2": (FlashBackend(kernel="flash_attn"), PACKED_CASES),
    "varlen": (FlashBackend(kernel="varlen"), PACKED_CASES),
    "xformers": (XformersBackend(), PACKED_CASES),
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("flash_attn", "varlen", "xformers")
every_way = pytest.mark.parametrize("way", WAYS)


def run(backend, whole, cotangent=None):
    """Return the output and all gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in whole.tensors()]
    output = execute(backend, whole.with_tensors(tuple(leaves))).output
    cotangent = torch.ones_like(output) if cotangent is None else cotangent
    return output, *torch.autograd.grad(output, leaves, cotangent, allow_unused=True, materialize_grads=True)


def assert_equal(got, expected):
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == wanted.dtype and actual.device == wanted.device
        assert torch.equal(actual, wanted)


@every_way
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(way, default):
    backend, cases = WAYS[way]
    before = torch.get_default_dtype()
    for case in cases:
        whole = case.attention()
        expected = run(backend, whole)
        torch.set_default_dtype(default)
        try:
            got = run(backend, whole)
        finally:
            torch.set_default_dtype(before)
        assert_equal(got, expected)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("flash_attention_2", "varlen", "xformers")])
def test_the_default_device_changes_nothing(way):
    """The fake kernels create tensors on the default device, so packed kernels are not tested here."""
    backend, cases = WAYS[way]
    for case in cases:
        whole = case.attention()
        expected = run(backend, whole)
        with torch.device("meta"):
            got = run(backend, whole, torch.ones_like(expected[0]))
        assert_equal(got, expected)


@every_way
def test_the_layout_of_the_output_gradient_changes_nothing(way):
    backend, cases = WAYS[way]
    for case in cases:
        whole = case.attention()
        shape = (whole.batch, whole.heads, whole.q_len, whole.value_dim)
        for cotangent in (
            torch.randn(shape).to(whole.query.dtype).mT.contiguous().mT,
            torch.randn(shape[2:]).to(whole.query.dtype).expand(shape),
        ):
            assert_equal(run(backend, whole, cotangent), run(backend, whole, cotangent.contiguous()))


@every_way
def test_a_second_run_on_equal_tensors_gives_the_same(way):
    """The results are also equal after a run on other values in the same tensors."""
    backend, cases = WAYS[way]
    for case in cases:
        whole, other = case.attention(), case.attention(seed=1)
        expected = run(backend, whole)
        run(backend, other)
        assert_equal(run(backend, whole), expected)


@pytest.mark.parametrize("way", ["cpu kernel", "public calls", "blocked-local", "lsh", "flash_attention_2", "xformers"])
def test_masks_and_biases_that_change_in_place_between_calls_are_read_again(way):
    backend, cases = WAYS[way]
    for case in cases:
        whole, changed = case.attention(), case.attention()
        run(backend, changed)
        masks = {id(mask): mask for segment in changed.segments for mask in (segment.key_mask, segment.mask)}
        for mask in masks.values():  # hash rounds share a mask
            if mask is not None:
                mask[..., 3:9] = ~mask[..., 3:9]
        for segment in changed.segments:
            if segment.bias is not None:
                with torch.no_grad():
                    segment.bias.values.neg_()
        expected = run(backend, replace(changed, segments=tuple(map(copied, changed.segments))))
        assert_equal(run(backend, changed), expected)
        has_terms = any(s.key_mask is not None or s.mask is not None or s.bias is not None for s in whole.segments)
        assert not has_terms or not torch.equal(expected[0], run(backend, whole)[0])


def copied(segment):
    def copy(tensor):
        return None if tensor is None else tensor.clone()

    bias = segment.bias and replace(segment.bias, values=segment.bias.values.detach().clone())
    return replace(segment, key_mask=copy(segment.key_mask), mask=copy(segment.mask), bias=bias)


@pytest.mark.parametrize("failing", [0.0, 0.25], ids=["the default kernel", "a forced kernel"])
def test_a_call_that_raises_leaves_kernel_switches_and_lock_free(monkeypatch, failing):
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(sdpa.flash_cpu, "unavailable", lambda: "this test wants public calls")
    monkeypatch.setattr(sdpa, "_default_kernel", lambda *args: sdpa.SDPBackend.FLASH_ATTENTION)  # so dropout is forced

    def broken(*args, **kwargs):
        if kwargs["dropout_p"] == failing:
            raise MemoryError("no memory")
        return attend(*args, **kwargs)

    calls = [AttentionCase(dropout=dropout).attention() for dropout in (failing, 0.25 - failing)]
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
        with pytest.raises(MemoryError):
            execute(SdpaBackend(), calls[0])
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    threads = ThreadPoolExecutor(1)
    try:
        for whole in (*calls, *calls):
            assert threads.submit(execute, SdpaBackend(), whole).result(timeout=20).kernel in ("flash", "math")
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
