"""Hypothesis strategies for attentions: any shape, dtype, pattern, mask and bias."""

import hypothesis.strategies as st
import torch

import attnzoo
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.global_keys import find_global_keys
from attnzoo.spec.segments import Attention, Segment

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
    """For each sample, padding on the left, on the right, anywhere, everywhere or nowhere."""
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
    """For each sample, no, one, some or all tokens are global."""
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
    # The standard deviation of the scores: from nearly uniform to sharp attention. With larger scores the softmax
    # saturates, and the gradient of any flash kernel consists of the rounding of its output.
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
        keys = find_global_keys(chosen)
        if keys is not None:
            segments = [
                Segment(key, value, pattern, real & ~chosen),
                Segment(keys.take(key), keys.take(value), key_mask=keys.valid),
            ]
    query_mask = draw(st.one_of(st.none(), key_masks(batch, q_len)))
    return Attention(query, tuple(segments), scale, query_mask=query_mask)
