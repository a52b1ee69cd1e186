"""Every backend equals the oracle on anything: shapes, dtypes, patterns, masks, biases, forward and backward."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, note

import attnzoo
from attnzoo.conformance.attention_check import check_attention
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.global_keys import locate
from attnzoo.spec.segments import Attention, Segment
from tests.conftest import DEVICES

BACKENDS = [name for name, info in attnzoo.backends().items() if info.available and info.exact and name != "eager"]
LENGTHS = st.one_of(st.integers(1, 9), st.integers(10, 80), st.sampled_from([63, 64, 65, 127, 128, 129, 200, 300]))


@st.composite
def patterns(draw, q_len, kv_len):
    kinds = ["full", "causal", "window", "causal window"] + (["chunks"] if q_len == kv_len else [])
    kind = draw(st.sampled_from(kinds))
    offset = draw(st.sampled_from([None, None, 0, kv_len - q_len, 3]))
    side = st.integers(0, kv_len + 2)
    if kind == "full":
        return attnzoo.Full()
    if kind == "causal":
        return attnzoo.Causal(offset)
    if kind == "causal window":
        return attnzoo.Window(draw(st.integers(1, kv_len + 2)), 0, offset)
    if kind == "window":
        return attnzoo.Window(draw(side), draw(st.integers(1, kv_len + 2)), offset)
    length = draw(st.integers(1, kv_len + 1))
    return attnzoo.Chunks(length, draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.booleans()))


@st.composite
def key_masks(draw, batch, length):
    """Padding left, right, anywhere, everywhere or nowhere, each sample its own way."""
    rows = []
    for _ in range(batch):
        kind = draw(st.sampled_from(["none", "left", "right", "anywhere", "all"]))
        real = torch.ones(length, dtype=torch.bool)
        cut = draw(st.integers(0, length))
        if kind == "left":
            real[:cut] = False
        elif kind == "right":
            real[cut:] = False
        elif kind == "anywhere":
            real = torch.rand(length, generator=torch.Generator().manual_seed(cut)) < 0.5
        elif kind == "all":
            real[:] = False
        rows.append(real)
    return torch.stack(rows)


@st.composite
def global_tokens(draw, batch, length):
    """Zero, one, some or all tokens global, each sample its own way."""
    rows = []
    for _ in range(batch):
        kind = draw(st.sampled_from(["zero", "one", "some", "all"]))
        chosen = torch.zeros(length, dtype=torch.bool)
        at = draw(st.integers(0, length - 1))
        if kind == "one":
            chosen[at] = True
        elif kind == "some":
            chosen = torch.rand(length, generator=torch.Generator().manual_seed(at)) < 0.3
        elif kind == "all":
            chosen[:] = True
        rows.append(chosen)
    return torch.stack(rows)


@st.composite
def attentions(draw):
    batch, kv_heads, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads, dim = kv_heads * ratio, draw(st.sampled_from([1, 3, 8, 16, 33]))
    kv_len = draw(LENGTHS)
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len), LENGTHS))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([dim**-0.5, 1.0, 0.1]))
    # Scores of this standard deviation: from nearly uniform to sharp attention. Beyond, the softmax saturates, and a
    # gradient that is zero but for the rounding of `out` is what any flash kernel returns.
    spread = (draw(st.sampled_from([0.3, 1.0, 3.0])) / (scale * dim**0.5)) ** 0.5

    def normal(*shape, std=1.0):
        return (std * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype).requires_grad_()

    query = normal(batch, heads, q_len, dim, std=spread)
    key, value = normal(batch, kv_heads, kv_len, dim, std=spread), normal(batch, kv_heads, kv_len, dim)
    extra = draw(st.sampled_from(["none", "none", "relative", "dense", "mask", "globals", "globals"]))
    key_mask = draw(st.one_of(st.none(), key_masks(batch, kv_len)))
    pattern = draw(patterns(q_len, kv_len))
    trained = draw(st.booleans())
    bias = mask = None
    if extra == "relative":
        width = draw(st.integers(1, 12))
        values = normal(draw(st.sampled_from([1, heads])), width).detach().requires_grad_(trained)
        positions = None
        if draw(st.booleans()):
            positions = torch.randint(0, kv_len, (batch, q_len), generator=random)
        bias = RelativeBias(values, zero=draw(st.integers(0, width - 1)), positions=positions)
    elif extra == "dense":
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), q_len, kv_len)
        bias = DenseBias(normal(*shape).detach().requires_grad_(trained))
    elif extra == "mask":
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), q_len, kv_len)
        mask = torch.rand(shape, generator=random) < draw(st.sampled_from([0.1, 0.6]))
    segments = [Segment(key, value, pattern, key_mask, mask, bias)]
    if extra == "globals":
        real = torch.ones((batch, kv_len), dtype=torch.bool) if key_mask is None else key_mask
        chosen = draw(global_tokens(batch, kv_len)) & real
        found = locate(chosen)
        if found is not None:
            segments = [
                Segment(key, value, pattern, real & ~chosen),
                Segment(found.take(key), found.take(value), key_mask=found.valid),
            ]
    query_mask = draw(st.one_of(st.none(), key_masks(batch, q_len)))
    return Attention(query, tuple(segments), scale, query_mask=query_mask)


def on(device, attention):
    """The attention with all its tensors on a device."""

    def moved(tensor):
        return None if tensor is None else tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    def segment(one):
        bias = one.bias
        if isinstance(bias, RelativeBias):
            bias = replace(bias, positions=moved(bias.positions))
        return replace(one, key_mask=moved(one.key_mask), mask=moved(one.mask), bias=bias)

    # Tensors of different devices do not make an attention, so it is made once, when all of them have moved.
    parts = object.__new__(Attention)
    vars(parts).update(vars(attention), query_mask=moved(attention.query_mask))
    vars(parts)["segments"] = tuple(map(segment, attention.segments))
    return parts.with_tensors(tuple(map(moved, attention.tensors())))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@given(attention=attentions(), grad=st.booleans())
def test_a_backend_equals_the_oracle(device, backend, attention, grad):
    made, attention = registry.make_backend(backend), on(device, attention)
    note(f"{attention.request()}")
    if registry.refusals(made, attention.request()):
        with pytest.raises(attnzoo.BackendRefusedError):
            execute(made, attention)
        return
    report = check_attention("drawn", attention, made, grad=grad, max_rows=1 << 30)
    assert report.ok, "\n".join(map(str, report.checks))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
@given(attention=attentions())
def test_rows_that_see_nothing_are_zero_forward_and_backward(device, backend, attention):
    made, attention = registry.make_backend(backend), on(device, attention)
    if registry.refusals(made, attention.request()):
        return
    rows = torch.arange(attention.q_len, device=device)
    live = torch.zeros((attention.batch, attention.heads, attention.q_len), dtype=torch.bool, device=device)
    for segment in attention.segments:
        seen = segment.visible(rows, torch.arange(segment.kv_len, device=device), attention.q_len)
        live |= torch.ones((), dtype=torch.bool, device=device) if seen is None else seen.any(-1)
    if attention.query_mask is not None:
        live &= attention.query_mask[:, None]
    output = execute(made, attention).output
    leaves = [tensor for tensor in attention.tensors() if tensor.requires_grad]
    (grad_query, *others) = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert (output[~live] == 0).all()
    assert (grad_query[~live] == 0).all()
    assert all(grad.isfinite().all() for grad in others)
