"""All Triton kernels of the model families compile for three compute capabilities, without spilled registers."""

import os
from dataclasses import replace

import pytest
import torch

from attnzoo.backends.triton.tile_sizes import is_interpreted
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.hashed import HashedChunks, HashRound
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Segment

pytest.importorskip("triton", reason="the package triton is not installed")
from tests.support.compiled_triton import compile_attention, operations_of

LENGTH = 2048
SHARED = {(8, 0): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
IS_LONG = os.environ.get("ATTNZOO_HYPOTHESIS_PROFILE") == "long"
pytestmark = pytest.mark.skipif(is_interpreted(), reason="TRITON_INTERPRET=1: Triton compiles nothing")


def rows(heads, length, dim, dtype):
    """A tensor in the layout of models, which requires grad."""
    return torch.zeros(1, length, heads, dim, dtype=dtype).transpose(1, 2).requires_grad_()


def segment(heads, length, dim, dtype, pattern=Full(), bias=None, is_masked=True):
    mask = torch.ones(1, length, dtype=torch.bool) if is_masked else None
    return Segment(rows(heads, length, dim, dtype), rows(heads, length, dim, dtype), pattern, mask, bias=bias)


def table(heads, reach, dtype, positions=None):
    return RelativeBias(torch.zeros(heads, 2 * reach + 1, dtype=dtype).requires_grad_(), reach, positions=positions)


def whole(query, *segments, **more):
    return Attention(
        query, segments, more.pop("scale", 0.125), query_mask=torch.ones(1, LENGTH, dtype=torch.bool), **more
    )


def led(dtype):
    window = segment(12, LENGTH, 64, dtype, Window(512, 512))
    return whole(rows(12, LENGTH, 64, dtype), window, segment(12, 3, 64, dtype))


def longt5_local(dtype):
    window = segment(12, LENGTH, 64, dtype, Window(127, 127), table(12, 127, dtype))
    return whole(rows(12, LENGTH, 64, dtype), window, scale=1.0)


def longt5_tglobal(dtype):
    (window,) = longt5_local(dtype).segments
    positions = torch.zeros(1, LENGTH, dtype=torch.long)
    aggregates = segment(12, LENGTH // 16, 64, dtype, Full(), table(12, 128, dtype, positions))
    return whole(rows(12, LENGTH, 64, dtype), window, aggregates, scale=1.0)


def reformer_local(dtype):
    return whole(rows(8, LENGTH, 128, dtype), segment(8, LENGTH, 128, dtype, Chunks(128, 1, 0, causal=True)))


def reformer_lsh(dtype):
    hashes, keys = 3, (rows(8, 3 * LENGTH, 128, dtype), rows(8, 3 * LENGTH, 128, dtype))
    order, token = (torch.zeros(1, 8, length, dtype=torch.long) for length in (LENGTH, hashes * LENGTH))
    rounds = (SortedChunks(256, 1, 0, True, number * LENGTH, order, token) for number in range(hashes))
    segments = (Segment(*keys, pattern) for pattern in rounds)
    return whole(rows(8, LENGTH, 128, dtype), *segments, empty=rows(8, LENGTH, 128, dtype))


def hashed(dtype):
    """The last of the rounds of the backend ``lsh``, which hides the keys of the earlier rounds."""
    by_head = torch.zeros(1, 12, LENGTH, dtype=torch.long)
    hash_round = HashRound(by_head, by_head, by_head[:, 0], by_head, by_head)
    keys = segment(12, LENGTH, 64, dtype)
    patterns = (Window(1, 0), *(HashedChunks(64, 1, 0, True, 2, rounds=(hash_round,) * count) for count in (1, 4)))
    return whole(rows(12, LENGTH, 64, dtype), *(replace(keys, pattern=pattern) for pattern in patterns))


def dropped(dtype):
    return replace(led(dtype), dropout=0.1)


def softcapped(dtype):
    return replace(causal(dtype), softcap=50.0)


def dense(dtype):
    """A dense mask, and a trained dense bias."""
    keys, shape = segment(12, LENGTH, 64, dtype, Window(512, 512)), (1, 12, LENGTH, LENGTH)
    mask, values = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=dtype).requires_grad_()
    bias = DenseBias(values.expand(shape))
    return whole(rows(12, LENGTH, 64, dtype), replace(keys, mask=mask.expand(shape), bias=bias))


def causal(dtype, dim=128):
    return whole(rows(16, LENGTH, dim, dtype), segment(2, LENGTH, dim, dtype, Causal(), is_masked=False))


FAMILIES = dict(
    led=led, longt5_local=longt5_local, longt5_tglobal=longt5_tglobal, reformer_local=reformer_local,
    reformer_lsh=reformer_lsh, hashed=hashed, causal=causal, dropped=dropped, softcapped=softcapped, dense=dense,
)  # fmt: skip
# In every run of the tests, most forms for one card. In a long run, all forms for all cards, also in float32.
_FEW = [
    ((9, 0), "led"),
    ((8, 9), "longt5_tglobal"),
    ((9, 0), "reformer_local"),
    ((8, 9), "reformer_lsh"),
    ((8, 9), "hashed"),
    ((9, 0), "softcapped"),
    ((9, 0), "dense"),
    ((8, 0), "causal"),
]
CASES = [(card, name, torch.bfloat16) for card, name in _FEW]
LONG_CASES = [(card, name, dtype) for card in SHARED for name in FAMILIES for dtype in (torch.bfloat16, torch.float32)]


def check(capability, attention, folder):
    kernels = compile_attention(attention, capability, folder)
    assert {"forward_kernel", "query_kernel", "key_kernel"} <= {kernel.name for kernel in kernels}
    for kernel in kernels:
        assert kernel.stack == 0, f"{kernel}: registers are spilled to the stack"
        assert kernel.shared <= SHARED[capability], f"{kernel}: more shared memory than a block may use"
    return kernels


@pytest.mark.parametrize(("capability", "family", "dtype"), LONG_CASES if IS_LONG else CASES)
def test_kernels_of_a_family_fit_a_card(tmp_path, capability, family, dtype):
    kernels = {kernel.name for kernel in check(capability, FAMILIES[family](dtype), tmp_path)}
    assert ("distance_kernel" in kernels) == family.startswith("longt5")
    assert ("position_kernel" in kernels) == (family == "longt5_tglobal")


@pytest.mark.skipif(not IS_LONG, reason="runs with ATTNZOO_HYPOTHESIS_PROFILE=long")
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_widest_heads_fit_a_card(tmp_path, capability, dtype):
    check(capability, causal(dtype, 256), tmp_path)


def test_a_new_length_compiles_nothing(tmp_path, monkeypatch):
    """Lengths and windows are arguments of a kernel, not constants of its code."""
    names = []
    for length, reach in ((LENGTH, 512), (LENGTH + 37, 129)):
        monkeypatch.setattr(f"{__name__}.LENGTH", length)
        keys = segment(12, length, 64, torch.bfloat16, Window(reach, reach))
        kernels = compile_attention(whole(rows(12, length, 64, torch.bfloat16), keys), (9, 0), tmp_path, grad=False)
        names.append([kernel.file for kernel in kernels])
    assert names[0] == names[1]


# Operations that launch nothing: new tensors, and views.
FREE = {"empty", "empty_like", "new_empty", "detach", "alias", "view", "_unsafe_view", "transpose", "unsqueeze",
        "select", "split", "split_with_sizes", "expand", "as_strided", "permute", "reshape", "slice"}  # fmt: skip
WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "index", "unique"}


# The numbers of launches in a forward, and in forward and backward.
LAUNCHES = dict(
    led=(1, 6), longt5_local=(2, 7), longt5_tglobal=(3, 13), reformer_local=(1, 5), reformer_lsh=(3, 17),
    hashed=(18, 36), causal=(1, 5), dropped=(2, 7), softcapped=(1, 5), dense=(1, 4),
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_launches_few_kernels_and_never_waits(family):
    """Python starts each kernel, and this takes longer than a short kernel runs."""
    attention = FAMILIES[family](torch.bfloat16)
    for grad, most in zip((False, True), LAUNCHES[family], strict=True):
        names = operations_of(attention, grad)
        launched = [name for name in names if name not in FREE]
        assert len(launched) <= most, launched
        assert not WAITING & set(names)
