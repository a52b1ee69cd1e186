"""What the backend ``triton`` declares and refuses, where it is available, and when ``auto`` prefers it."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import util
from types import SimpleNamespace

import pytest
import torch

import attnzoo
from attnzoo.backends.triton import availability
from attnzoo.backends.triton import backend as triton_backend
from attnzoo.backends.triton.backend import TritonBackend
from attnzoo.backends.triton.tile_sizes import compiled_tile
from attnzoo.registry import registry
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Request, SegmentRequest

PLAIN = SegmentRequest(Causal(), kv_heads=4)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("kernel", ["forward", "query", "key", "dense", "distance", "position"])
def test_the_sides_of_tiles_suit_matrix_products(kernel, dim, dtype, capability):
    """``tl.arange`` needs powers of two, and ``tl.dot`` at least 16."""
    tile = compiled_tile(kernel, dim, dtype, capability)
    assert {tile.queries, tile.keys} <= {16, 32, 64, 128} and tile.warps in (4, 8) and 1 <= tile.stages <= 4


def request_of(*segments, **changes):
    request = Request("cuda", torch.bfloat16, 4, 64, 64, segments or (PLAIN,))
    return replace(request, **changes)


def refused(request):
    return {refusal.field: (refusal.got, refusal.allowed) for refusal in TritonBackend().refusals(request)}


def test_every_head_up_to_256_is_supported():
    assert not refused(request_of(head_dim=256, value_dim=72))
    assert refused(request_of(head_dim=257, value_dim=300)) == {
        "head_dim": ("257", "at most 256"),
        "value_dim": ("300", "at most 256"),
    }


@pytest.mark.parametrize("pattern", [SortedChunks(8), HashedChunks(8)])
def test_a_bias_with_sorted_keys_is_refused(pattern):
    biased = SegmentRequest(pattern, kv_heads=4, bias="relative")
    refusal = ("a bias with SortedChunks or HashedChunks", "no bias with these patterns")
    assert refused(request_of(biased)) == {"bias": refusal}
    assert not refused(request_of(replace(biased, bias=None)))


@pytest.mark.parametrize("changes", [dict(dtype=torch.float64), dict(transforms=("jvp",)), dict(probabilities=True)])
def test_other_limits_are_refused(changes):
    assert len(refused(request_of(**changes))) == 1


def test_without_triton_the_backend_is_unavailable(monkeypatch):
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None if name == "triton" else util.find_spec(name))
    assert TritonBackend.unavailable().startswith("the package triton is not installed")


def test_without_a_card_the_backend_is_unavailable(monkeypatch):
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch.__version__ in TritonBackend.unavailable()


@pytest.fixture
def with_card(monkeypatch):
    """A machine that seems to have Triton and a card. The check of the kernels runs again."""
    monkeypatch.setattr(triton_backend, "is_interpreted", lambda: False)
    monkeypatch.setattr(triton_backend, "no_device", lambda: None)
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: True)
    monkeypatch.setattr(availability, "import_package", lambda *_: (SimpleNamespace(__version__="3.6.0"), ""))
    availability.why_unusable.cache_clear()
    yield
    availability.why_unusable.cache_clear()


def test_a_broken_triton_is_unavailable(monkeypatch, with_card):
    why = "triton cannot be imported: ImportError: libcuda.so.1"
    monkeypatch.setattr(availability, "import_package", lambda *_: (None, why))
    assert TritonBackend.unavailable() == why


def test_a_triton_that_runs_no_kernel_is_unavailable(monkeypatch, with_card):
    def fail(device):
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(availability, "_small_attention", fail)
    expected = "triton 3.6.0 cannot run a kernel on cuda: RuntimeError: 0 active drivers"
    assert TritonBackend.unavailable() == expected
    assert attnzoo.backends()["triton"].reason == expected


def test_a_triton_that_computes_wrong_results_is_unavailable(monkeypatch, with_card):
    monkeypatch.setattr(availability, "_small_attention", lambda device: torch.tensor([1.0, 0.0]))
    assert "wrong result" in TritonBackend.unavailable()


def test_the_kernels_are_tried_once(monkeypatch, with_card):
    tried = []
    monkeypatch.setattr(availability, "_small_attention", lambda device: tried.append(device) or torch.ones(2))
    assert TritonBackend.unavailable() is TritonBackend.unavailable() is None
    assert tried == ["cuda"]


def test_a_bias_of_another_class_is_refused():
    """The kernels read the values of a bias, and would ignore an overridden method."""

    class Other(attnzoo.RelativeBias):
        pass

    q = torch.randn(1, 2, 5, 8)
    segment = attnzoo.Segment(q, q, bias=Other(torch.zeros(2, 3), zero=1))
    with pytest.raises(attnzoo.BackendRefusedError, match="got Other; allowed: RelativeBias or DenseBias itself"):
        triton_backend.check_biases(attnzoo.Attention(q, (segment,), 1.0))


def test_the_kernels_are_imported_at_their_first_use():
    """So attnzoo works where Triton is missing or broken."""
    code = "import sys, attnzoo; attnzoo.backends(); sys.exit('attnzoo.backends.triton.plan' in sys.modules)"
    without_card = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=without_card).returncode == 0


@pytest.mark.parametrize(
    ("segments", "is_first"),
    [
        ((PLAIN,), False),
        ((replace(PLAIN, pattern=Full()),), False),
        ((replace(PLAIN, pattern=Window(8, 8)),), True),
        ((replace(PLAIN, pattern=Chunks(8)),), True),
        ((replace(PLAIN, pattern=SortedChunks(8)),), True),
        ((replace(PLAIN, pattern=HashedChunks(8)),), True),
        ((replace(PLAIN, bias="relative"),), True),
        ((replace(PLAIN, mask=True),), True),
        ((PLAIN, replace(PLAIN, pattern=Full())), True),
    ],
    ids=["causal", "full", "window", "chunks", "sorted chunks", "hashed chunks", "bias", "dense mask", "two segments"],
)
def test_auto_prefers_triton_where_pytorchs_kernels_do_not_fit(monkeypatch, isolated_registry, segments, is_first):
    monkeypatch.setattr(TritonBackend, "unavailable", classmethod(lambda cls: None))
    names = [backend.name for backend in registry.supporting_backends(request_of(*segments))]
    assert (names[0] == "triton") == is_first and "triton" in names
