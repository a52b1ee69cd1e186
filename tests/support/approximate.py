"""Attentions for the tests of approximate backends, and the definition in plain loops that they are compared with."""

import itertools

import torch

import attnzoo
from attnzoo.backends.eager import evaluate
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.segments import Attention, Segment

# (start, stop) of the real keys of each of two samples; None: no padding.
KEYS = {
    "no padding": None,
    "left": [(5, 13), (0, 13)],
    "right": [(0, 9), (0, 13)],
    "both": [(3, 10), (0, 2)],
    "a sample": [(13, 13), (4, 13)],
}


def key_mask(spans, length=13):
    if spans is None:
        return None
    places = torch.arange(length)
    return torch.stack([(places >= start) & (places < stop) for start, stop in spans])


def attention(pattern, real, q_len=13, kv_len=13, kv_heads=2, bias=False, mask=None, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    query, key, value = normal(2, 4, q_len, 8), normal(2, kv_heads, kv_len, 8), normal(2, kv_heads, kv_len, 8)
    table = RelativeBias(normal(4, 9), zero=4) if bias else None
    return Attention(query, (Segment(key, value, pattern, real, mask, table),), 0.4)


def masked(whole, sees):
    """Return the attention whose dense mask is ``sees(sample, head, query, key)``, besides its own masks."""
    (segment,) = whole.segments
    sizes = (whole.batch, whole.heads, whole.q_len, segment.kv_len)
    grid = torch.tensor([sees(*index) for index in itertools.product(*map(range, sizes))]).view(sizes)
    if segment.key_mask is not None:
        grid = grid & segment.key_mask[:, None, None]
    if segment.mask is not None:
        grid = grid & segment.mask
    return Attention(whole.query, (Segment(segment.key, segment.value, mask=grid, bias=segment.bias),), whole.scale)


def matches_definition(backend, whole, sees):
    """Whether the output of a backend in float64 equals the output of the oracle with the mask ``sees``."""
    whole = whole.with_tensors(tuple(tensor.double() for tensor in whole.tensors()))
    return torch.allclose(backend.run(whole).output, evaluate(masked(whole, sees)).output, rtol=0, atol=1e-12)


def assert_refused(call, *words):
    """Assert that a call raises an error of attnzoo whose message has all these words; return the error."""
    try:
        call()
    except attnzoo.AttnzooError as error:
        assert all(word in str(error) for word in words), str(error)
        return error
    raise AssertionError("nothing was raised")
