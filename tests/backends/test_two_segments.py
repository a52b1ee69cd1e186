"""Two segments that differ in one thing: each backend reads masks, biases and lengths from the right segment."""

from dataclasses import replace

import pytest
import torch

from attnzoo.backends.flex import kernel as flex_kernel
from attnzoo.backends.flex.backend import FlexBackend
from attnzoo.backends.sdpa import flash_cpu
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.backends.varlen.xformers import XformersBackend
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.registry import registry
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.patterns import Causal, Chunks, Full, Window
from attnzoo.spec.segments import Attention, Segment

# Three blocks of 64 queries, or several blocks of 32 queries with equal masks.
BATCH, HEADS, LENGTH, DIM = 2, 4, 150, 8
WINDOW = Window(7, 5)


class Draw:
    """Factory of attentions with equal seeds. Two attentions differ only in the difference under test."""

    def __init__(self, dtype, value_dim):
        self.dtype, self.value_dim, self.random = dtype, value_dim, torch.Generator().manual_seed(0)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def segment(self, kv_len=LENGTH, kv_heads=HEADS, pattern=WINDOW, **terms):
        key, value = (self.normal(BATCH, kv_heads, kv_len, dim) for dim in (DIM, self.value_dim))
        return Segment(key, value, pattern, **terms)

    def attention(self, first, second, **terms):
        return Attention(self.normal(BATCH, HEADS, LENGTH, DIM), (first, second), 0.5, **terms)


def keys(*spans, length=LENGTH):
    """Return a key mask that hides one span of each sample."""
    place = torch.arange(length)
    return torch.stack([(place < start) | (place >= stop) for start, stop in spans])


PADDING, OTHER = keys((40, 100), (0, 0)), keys((0, 10), (130, 150))
ALL, NONE = keys((0, 0), (0, 0)), keys((0, LENGTH), (0, LENGTH))
DENSE = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
TABLE = torch.randn(HEADS, 9, generator=torch.Generator().manual_seed(2))
VALUES = torch.randn(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3))
POSITIONS = torch.randint(-9, LENGTH + 9, (BATCH, LENGTH), generator=torch.Generator().manual_seed(4))
RELATIVE, DENSE_BIAS = RelativeBias(TABLE, zero=4), DenseBias(VALUES)

# Per difference: the terms of the first and of the second segment. Rows of one case run one after the other, because
# a cache must not return what belongs to the other segment or to the attention before.
DIFFERENCES = {
    "nothing": [({}, {})],
    "padding": [
        ({}, dict(key_mask=PADDING)),
        (dict(key_mask=PADDING), {}),
        (dict(key_mask=PADDING), dict(key_mask=OTHER)),
        (dict(key_mask=OTHER), dict(key_mask=PADDING)),
        (dict(key_mask=PADDING), dict(key_mask=PADDING)),
        (dict(key_mask=ALL), dict(key_mask=PADDING)),
        (dict(key_mask=PADDING), dict(key_mask=NONE)),
        (dict(key_mask=NONE), dict(key_mask=PADDING)),
        (dict(key_mask=NONE), dict(key_mask=NONE)),
    ],
    "pattern": [
        ({}, dict(pattern=Window(5, 7))),
        ({}, dict(pattern=replace(WINDOW, offset=3))),
        (dict(pattern=replace(WINDOW, offset=3)), {}),
        (dict(pattern=replace(WINDOW, offset=150)), dict(key_mask=PADDING)),
        (dict(pattern=replace(WINDOW, offset=60)), dict(pattern=replace(WINDOW, offset=70))),  # blocks without keys
        ({}, dict(pattern=Full())),
        (dict(pattern=Chunks(20, 1, 1)), dict(pattern=Chunks(20, 1, 0, causal=True))),
        (dict(pattern=Causal()), dict(pattern=Causal(-40))),
    ],
    "length": [
        ({}, dict(kv_len=90)),
        (dict(kv_len=90), {}),
        (dict(kv_len=90, key_mask=PADDING[:, :90]), dict(kv_len=70, key_mask=PADDING[:, :70])),
        ({}, dict(kv_len=1, pattern=Full())),
        (dict(pattern=Causal(), kv_len=200), dict(pattern=Causal(), kv_len=90)),
    ],
    "key heads": [
        ({}, dict(kv_heads=2)),
        (dict(kv_heads=1), {}),
        (dict(kv_heads=2), dict(kv_heads=1, key_mask=PADDING)),
        (dict(kv_heads=2, key_mask=OTHER), dict(kv_heads=2)),
    ],
    "dense mask": [
        ({}, dict(mask=DENSE)),
        (dict(mask=DENSE), {}),
        (dict(mask=DENSE), dict(mask=~DENSE[:1].expand(-1, HEADS, -1, -1))),
        (dict(mask=DENSE), dict(key_mask=PADDING)),
    ],
    "bias": [
        ({}, dict(bias=RELATIVE)),
        (dict(bias=RELATIVE), {}),
        (dict(bias=RELATIVE), dict(bias=replace(RELATIVE, zero=1))),
        (dict(bias=RELATIVE), dict(bias=replace(RELATIVE, values=TABLE.flip(1)))),
        (dict(bias=replace(RELATIVE, offset=2)), dict(bias=replace(RELATIVE, offset=0))),
        (dict(bias=RELATIVE), dict(bias=replace(RELATIVE, values=TABLE[:1, :2], zero=1), kv_len=90)),
        (dict(bias=RELATIVE, key_mask=PADDING), dict(bias=RELATIVE, kv_heads=2)),
        (dict(bias=RELATIVE), dict(bias=replace(RELATIVE, positions=POSITIONS))),
        (dict(bias=replace(RELATIVE, positions=POSITIONS)), dict(bias=replace(RELATIVE, positions=POSITIONS.flip(0)))),
    ],
    "trained bias": [
        ({}, dict(bias=replace(RELATIVE, values=TABLE.clone().requires_grad_()))),
        (dict(bias=replace(RELATIVE, values=TABLE.clone().requires_grad_())), dict(bias=RELATIVE, kv_len=90)),
        (dict(kv_len=90), dict(bias=replace(RELATIVE, values=TABLE.clone().requires_grad_()), key_mask=PADDING)),
    ],
    "dense bias": [
        ({}, dict(bias=DENSE_BIAS)),
        (dict(bias=DENSE_BIAS), {}),
        (dict(bias=DENSE_BIAS), dict(bias=DenseBias(VALUES.flip(2)))),
        (dict(bias=DENSE_BIAS), dict(bias=RELATIVE)),
        ({}, dict(bias=DenseBias(VALUES.clone().requires_grad_()))),
    ],
}
differences = pytest.mark.parametrize("difference", DIFFERENCES)
in_packed_rows = pytest.mark.parametrize("difference", ["nothing", "padding", "pattern", "length", "key heads"])
EXTRAS = {"plain": {}, "empty and padding queries": dict(empty=True, query_mask=OTHER)}
extras = pytest.mark.parametrize("extra", EXTRAS)


def attentions(difference, extra, dtype=torch.float32, value_dim=DIM):
    for first, second in DIFFERENCES[difference]:
        draw = Draw(dtype, value_dim)
        terms = dict(EXTRAS[extra])
        if "empty" in terms:
            terms["empty"] = draw.normal(BATCH, HEADS, LENGTH, value_dim)
        yield draw.attention(draw.segment(**first), draw.segment(**second), **terms)


def assert_agrees(backend, whole, grad=True):
    report = check_attention("pair", whole, backend, grad=grad, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, (whole.request(), *report.checks)))
    return report.kernel


@differences
@extras
def test_the_cpu_kernel_agrees_with_the_oracle(difference, extra):
    for whole in attentions(difference, extra):
        assert assert_agrees(registry.make_backend("sdpa"), whole) == flash_cpu.KERNEL


@differences
@extras
def test_public_calls_agree_with_the_oracle(difference, extra):
    for whole in attentions(difference, extra, value_dim=DIM + 3):
        assert assert_agrees(registry.make_backend("sdpa"), whole) in ("math", "none")


@pytest.fixture
def uncompiled(monkeypatch):
    """Let FlexAttention compute masks and biases of whole grids, without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    flex_kernel.compiled_kernel.cache_clear()
    yield
    flex_kernel.compiled_kernel.cache_clear()


@pytest.mark.parametrize("difference", [name for name in DIFFERENCES if "dense" not in name])
@extras
def test_flex_attention_agrees_with_the_oracle(uncompiled, difference, extra):
    for whole in attentions(difference, extra):
        assert assert_agrees(FlexBackend(), whole, grad=False) == "flex_cpu"


@in_packed_rows
@extras
def test_flash_attention_2_agrees_with_the_oracle(flash_attn, difference, extra):
    for whole in attentions(difference, extra, torch.float16):
        assert assert_agrees(FlashBackend(), whole) in ("flash_attn", "none")


@in_packed_rows
@extras
def test_xformers_agrees_with_the_oracle(xformers, difference, extra):
    for whole in attentions(difference, extra, torch.float16):
        assert assert_agrees(XformersBackend(), whole) in ("xformers_flash", "none")


@pytest.mark.parametrize("value_dim", [DIM, DIM + 3], ids=["cpu kernel", "public calls"])
@pytest.mark.parametrize("first", [2, 3])
def test_key_heads_that_do_not_divide_each_other_agree_with_the_oracle(uncompiled, first, value_dim):
    draw = Draw(torch.float32, value_dim)
    segments = (draw.segment(kv_heads=first), draw.segment(kv_heads=5 - first, key_mask=PADDING))
    whole = Attention(draw.normal(BATCH, 6, LENGTH, DIM), segments, 0.5)
    assert_agrees(registry.make_backend("sdpa"), whole)
    assert_agrees(FlexBackend(), whole, grad=False)
