"""The compiled kernel of ``flex_attention`` agrees with the oracle on drawn lengths, masks and biases.

A form takes many seconds to compile, so all examples have the same form. It contains chunks, a band and both kinds of
bias. On the CPU, the other property tests run all forms without the compiler. On CUDA, there is a second form, with
gradients, which PyTorch computes on CUDA only.
"""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, note

from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.spec.segments import Attention, Segment
from tests.properties.test_backends import on
from tests.support.drawn_attentions import Sizes, Tensors, chunks, key_masks, patterns, relative_biases


@st.composite
def attentions(draw):
    """Draw chunks and a band of other keys. The form is the same in all examples."""
    length = draw(st.one_of(st.integers(2, 80), st.sampled_from([127, 128, 129, 200])))
    # 16 is the smallest dimension on CUDA
    size = Sizes(batch=2, heads=4, kv_heads=2, q_len=length, kv_len=length, dim=16, value_dim=16)
    tensors = Tensors(draw(st.integers(0, 2**16)), torch.float32)
    band = replace(size, kv_len=draw(st.integers(1, 90)))
    segments = [
        Segment(*tensors.keys_values(size), draw(chunks(length))),
        Segment(*tensors.keys_values(band), draw(patterns(length, band.kv_len, has_chunks=False))),
    ]
    biases = draw(relative_biases(size, tensors)), draw(relative_biases(band, tensors, by_distance=True))
    positions = torch.randint(0, length, (size.batch, length), generator=tensors.random)
    segments[0] = replace(segments[0], bias=replace(biases[0], positions=positions))
    segments[1] = replace(segments[1], bias=biases[1])
    for number in draw(st.sampled_from([(), (0,), (1,), (0, 1)])):
        segment = segments[number]
        segments[number] = replace(segment, key_mask=draw(key_masks(size.batch, segment.kv_len)))
    query = tensors.normal(size.batch, size.heads, length, size.dim)
    return Attention(query, tuple(segments), 0.5, query_mask=draw(st.one_of(st.none(), key_masks(size.batch, length))))


@given(attentions())
def test_the_compiled_kernel_agrees_with_the_oracle(device, attention):
    attention = on(device, attention)
    note(f"{attention.request()}")
    report = check_attention("drawn", attention, "flex_attention", grad=False, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, report.checks))


@pytest.mark.cuda
@given(attentions())
def test_the_compiled_backward_agrees_with_the_oracle(attention):
    attention = on("cuda", attention)
    attention = attention.with_tensors(tuple(t.detach().requires_grad_() for t in attention.tensors()))
    report = check_attention("drawn", attention, "flex_attention", grad=True, max_rows=ALL_ROWS)
    assert report.ok, "\n".join(map(str, report.checks))
