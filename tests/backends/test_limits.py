"""Refusals with a limit: a backend accepts the limit, and refuses the next value."""

import shutil
from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo.backends.approximate.blocked_local import BlockedLocalBackend
from attnzoo.backends.approximate.lsh import LshBackend
from attnzoo.backends.common.additive_masks import TokenMasks
from attnzoo.backends.eager import EagerBackend
from attnzoo.backends.flex.backend import FlexBackend
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.backends.varlen import kernels
from attnzoo.backends.varlen.calls import MAX_SEQUENCES, plan_calls
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.backends.varlen.xformers import XformersBackend
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest
from tests.support.half import HALF, agrees, attention


def request(pattern=Full(), dim=8, value_dim=None, dtype=HALF, count=1, device="cpu", segment=None, **terms):
    """Return the request of an attention with ``count`` segments, which have the further properties ``segment``."""
    segments = (SegmentRequest(pattern, 2, **(segment or {})),) * count
    return Request(device, dtype, 2, dim, dim if value_dim is None else value_dim, segments, **terms)


FLASH, VARLEN = FlashBackend(kernel="flash_attn"), FlashBackend(kernel="varlen")
XF_FLASH, CUTLASS = XformersBackend(kernel="xformers_flash"), XformersBackend(kernel="xformers_cutlass")
HIDES = dict(pattern=Causal(), segment=dict(key_mask=True))
# (backend, the terms of an accepted request, the terms that make it refused, the field of the refusal)
LIMITS = {
    **{
        f"{backend.name} {backend.kernel}: {what}": (backend, dict(terms, **{dim: 256 - hides}),
                                                     dict(terms, **{dim: 257 - hides}), "head_dim")
        for backend in (FLASH, VARLEN, XF_FLASH)
        for what, hides, terms, dim in (
            ("head_dim", 0, {}, "dim"),
            ("head_dim with a key mask of Full", 0, dict(segment=dict(key_mask=True)), "dim"),
            ("head_dim if keys are hidden", 1, HIDES, "dim"),
            ("head_dim of sorted chunks", 1, dict(pattern=SortedChunks(4)), "dim"),
            ("head_dim of ordered chunks", 1, dict(pattern=Chunks(4, causal=True), segment=dict(key_mask=True)), "dim"),
            ("value_dim", 0, {}, "value_dim"),
            ("value_dim if keys are hidden", 1, HIDES, "value_dim"),
        )
    },
    "cutlass: head_dim": (CUTLASS, dict(dim=65536), dict(dim=65537), "head_dim"),
    "cutlass: value_dim if keys are hidden": (CUTLASS, dict(HIDES, value_dim=65535), dict(HIDES, value_dim=65536),
                                              "head_dim"),
    "cutlass: windows": (CUTLASS, dict(pattern=Causal()), dict(pattern=Window(3, 0)), "pattern"),
    "cutlass: float32": (CUTLASS, dict(dtype=torch.float32), dict(dtype=torch.float64), "dtype"),
    "xformers_flash: half": (XF_FLASH, dict(dtype=torch.bfloat16), dict(dtype=torch.float32), "dtype"),
    "flash_attn: half": (FLASH, dict(dtype=torch.bfloat16), dict(dtype=torch.float32), "dtype"),
    "flash_attn: dropout": (FLASH, dict(dropout=True), dict(dropout=True, probabilities=True),
                            "attention probabilities"),
    "varlen: dropout": (VARLEN, {}, dict(dropout=True), "dropout"),
    "xformers: dropout": (XF_FLASH, {}, dict(dropout=True), "dropout"),
    "flash_attn: mask": (FLASH, dict(segment=dict(key_mask=True)), dict(segment=dict(mask=True)), "mask"),
    "flash_attn: bias": (FLASH, {}, dict(segment=dict(bias="dense")), "bias"),
    "flash_attn: hashed": (FLASH, dict(pattern=SortedChunks(4)), dict(pattern=HashedChunks(4)), "pattern"),
    "flash_attn: transforms": (FLASH, {}, dict(transforms=("grad",)), "torch.func transform"),
    "flex: head_dim": (FlexBackend(), dict(device="cuda", dim=16), dict(device="cuda", dim=15, value_dim=16),
                       "head_dim"),
    "flex: value_dim": (FlexBackend(), dict(device="cuda", dim=16), dict(device="cuda", dim=16, value_dim=15),
                        "head_dim"),
    "flex: narrow heads on the cpu": (FlexBackend(), dict(dim=1), dict(dim=1, grad=True), "grad"),
    "flex: grad on cuda": (FlexBackend(), dict(device="cuda", dim=16, grad=True), dict(dim=16, grad=True), "grad"),
    "flex: dtype": (FlexBackend(), dict(dtype=torch.float32), dict(dtype=torch.float64), "dtype"),
    "flex: bias": (FlexBackend(), dict(segment=dict(bias="relative")), dict(segment=dict(bias="dense")), "bias"),
    "flex: mask": (FlexBackend(), dict(segment=dict(key_mask=True)), dict(segment=dict(mask=True)), "mask"),
    "sdpa: bias on sorted keys": (SdpaBackend(), dict(segment=dict(bias="relative")),
                                  dict(pattern=SortedChunks(4), segment=dict(bias="relative")), "bias"),
    "sdpa: bias on hashed keys": (SdpaBackend(), dict(pattern=HashedChunks(4)),
                                  dict(pattern=HashedChunks(4), segment=dict(bias="dense")), "bias"),
    "sdpa: probabilities": (SdpaBackend(), {}, dict(probabilities=True), "attention probabilities"),
    "sdpa: device": (SdpaBackend(), dict(device="cuda"), dict(device="xpu"), "device"),
    "eager: device": (EagerBackend(), dict(device="cuda"), dict(device="xpu"), "device"),
    **{
        f"{backend.name}: segments": (backend, dict(count=1 << 16), dict(count=(1 << 16) + 1), "segments")
        for backend in (EagerBackend(), SdpaBackend(), FlexBackend(), FLASH)
    },
    "blocked-local: segments": (BlockedLocalBackend(window=4), {}, dict(count=2), "segments"),
    "blocked-local: transforms": (BlockedLocalBackend(window=4), dict(transforms=("grad", "jvp")),
                                  dict(transforms=("vmap",)), "torch.func transform"),
    "blocked-local: options": (BlockedLocalBackend(), dict(pattern=Window(3, 3)), {}, "options"),
    "blocked-local: cross-attention": (BlockedLocalBackend(), dict(pattern=Full(cross=True)), {}, "options"),
    "lsh: segments": (LshBackend(num_hashes=1, chunk_length=2, num_buckets=2, inner="sdpa"), {}, dict(count=2),
                      "segments"),
    "lsh: transforms": (LshBackend(num_hashes=1, chunk_length=2, num_buckets=2, inner="sdpa"), {},
                        dict(transforms=("grad",)), "torch.func transform"),
    "lsh: options": (LshBackend(), dict(pattern=Chunks(3)), {}, "options"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS)
def test_a_request_is_accepted_at_the_limit_and_refused_past_it(flash_attn, varlen, xformers, case):
    backend, accepted, refused, field = LIMITS[case]
    assert not backend.refusals(request(**accepted))
    assert {refusal.field for refusal in backend.refusals(request(**refused))} == {field}


@pytest.mark.parametrize(
    ("backend", "option", "accepted", "refused"),
    [
        (BlockedLocalBackend, "window", 2, 1),
        (BlockedLocalBackend, "sinks", 0, -1),
        (LshBackend, "num_hashes", 1, 0),
        (LshBackend, "chunk_length", 1, 0),
        (LshBackend, "num_buckets", 1, 0),
        (LshBackend, "num_buckets", 2, 3),
        (LshBackend, "seed", 0, -1),
        (LshBackend, "seed", 2**63 - 1, 2**63),
    ],
)
def test_an_option_is_accepted_at_the_limit_and_refused_past_it(backend, option, accepted, refused):
    others = dict(num_hashes=1, chunk_length=2, num_buckets=2) if backend is LshBackend else dict(window=2)
    configured = backend(**{**others, option: accepted}, inner="sdpa")
    query = torch.randn(1, 2, 9, 4)
    whole = Attention(query, (Segment(query, query, Causal()),), 0.5)
    assert attnzoo.functional.execute(configured, whole).output.isfinite().all()
    with pytest.raises(attnzoo.InvalidArgumentError, match=f"{option} of backend"):
        backend(**{**others, option: refused})


def test_cross_attention_beside_dense_attention_is_dense():
    """Approximate backends keep cross-attention, but only if all segments are cross-attention."""
    cross, dense = (SegmentRequest(Full(cross=cross), 2) for cross in (True, False))
    for segments, refused in (((cross, cross), False), ((cross, dense), True), ((dense, cross), True)):
        two = replace(request(), segments=segments)
        for backend in (BlockedLocalBackend(window=4), LshBackend(num_hashes=1, chunk_length=2, num_buckets=2)):
            assert [refusal.field for refusal in backend.refusals(two)] == ["segments"] * refused
            assert (backend.changes(two) is not None) == refused


@pytest.mark.parametrize("scale", [2.0**-19, 2.0**-19 * 1.001])
def test_the_smallest_scale_that_hides_keys_hides_them(flash_attn, scale):
    holes = torch.arange(20)[None].expand(2, 20) % 3 != 1
    whole = attention(Causal(), key_mask=holes, scale=scale)
    agrees(whole, FLASH)
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"scale: got .*; allowed: at least 2\*\*-19"):
        FLASH.run(replace(whole, scale=2.0**-19 * 0.999))
    agrees(attention(Causal(), scale=2.0**-19 * 0.999), FLASH)


@pytest.mark.parametrize(("capability", "usable"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((10, 0), True)])
def test_a_device_is_usable_from_capability_8_on(monkeypatch, capability, usable):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    assert (kernels.no_device() is None) == usable
    assert (kernels.example_device() is not None) == usable


@pytest.mark.parametrize(("samples", "calls"), [(MAX_SEQUENCES, 1), (MAX_SEQUENCES + 1, 2)])
def test_a_call_has_as_many_sequences_as_the_grid_allows(samples, calls):
    key = torch.zeros(1, 1, 1, 2).expand(samples, 1, 1, 2)
    plan = plan_calls(Attention(key, (Segment(key, key),), 1.0))
    assert MAX_SEQUENCES == 65535 and len(plan.calls) == calls


@pytest.mark.parametrize(("value", "unavailable"), [(None, False), ("0", False), ("1", True)])
def test_flex_attention_is_unavailable_if_compilation_is_disabled(monkeypatch, value, unavailable):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", value)
    why = FlexBackend.unavailable()
    assert (why is not None) == unavailable and (why is None or "TORCHDYNAMO_DISABLE=1" in why)


@pytest.mark.parametrize(
    ("instructions", "compiler", "runs"),
    [("AVX2", "g++", True), ("AVX512", "clang++", True), ("DEFAULT", "g++", False), ("AVX2", "nothing", False)],
)
def test_flex_attention_needs_vector_instructions_and_a_compiler(monkeypatch, instructions, compiler, runs):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    fields = [refusal.field for refusal in FlexBackend().refusals(request())]
    assert fields == ([] if runs else ["device"])
    assert not FlexBackend().refusals(request(device="cuda", dim=16)), "the compiler of the host is not needed"
    assert not FlexBackend().refusals_anywhere(request()), "another machine may have both"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("largest", [2**24 - 1, 2**24, 2**24 + 1])
def test_tokens_beyond_the_integers_of_float32_are_told_apart(causal, largest):
    token = torch.tensor([[[largest - 1, largest]]])
    mask, _ = TokenMasks(token, causal, torch.float32).of(torch.tensor([[[largest, largest - 1]]]), 0, 2)
    expected = [[True, False], [False, False]] if causal else [[True, False], [False, True]]
    assert (mask == 0)[0, 0].tolist() == expected
