"""``attnzoo.attention`` with drawn arguments equals a dense softmax over the keys that the arguments allow."""

import contextlib

import hypothesis.strategies as st
import torch
from hypothesis import given, note

import attnzoo
from attnzoo.conformance.error_rule import plain_dtype
from attnzoo.registry import registry
from attnzoo.spec.bias import Bias
from attnzoo.spec.patterns import Full, Window
from attnzoo.spec.segments import FLOATS
from tests.support.compare import assert_obeys_the_error_rule
from tests.support.drawn_attentions import (
    EVERYTHING,
    Tensors,
    biases,
    chunks,
    global_tokens,
    key_masks,
    masks,
    patterns,
    sizes,
)  # fmt: skip
from tests.support.small_blocks import block_sizes

AUTOCASTS = [None, None, torch.bfloat16, torch.float16]


@st.composite
def calls(draw, capabilities=EVERYTHING, dims=(1, 3, 8, 16, 33)):
    """Draw the keywords of a call. Global keys and padding are drawn separately, so some global keys are padding."""
    wraps_around = draw(st.sampled_from([False, False, False, True]))
    size = draw(sizes(capabilities, dims, equal_lengths=wraps_around))
    dtype = draw(st.sampled_from([dtype for dtype in FLOATS if dtype in capabilities.dtypes]))
    scale = draw(st.sampled_from([None, 1.0, 0.1, -0.5]))
    spread = (size.dim**-0.5 if scale is None else scale, size.dim)
    tensors = Tensors(draw(st.integers(0, 2**16)), dtype, 1.0, *spread, draw(st.booleans()))
    key, value = tensors.keys_values(size)
    query = tensors.normal(size.batch, size.heads, size.q_len, size.dim, std=tensors.spread)
    call = dict(q=query, k=key, v=value, scale=scale)
    call["pattern"] = draw(chunks(size.kv_len, wrap_around=True) if wraps_around else patterns(size.q_len, size.kv_len))
    call["key_mask"] = draw(st.one_of(st.none(), key_masks(size.batch, size.kv_len)))
    call["query_mask"] = draw(st.one_of(st.none(), key_masks(size.batch, size.q_len)))
    extras = ["none", "global_keys", *(["bias"] if capabilities.bias else []), *(["mask"] if capabilities.mask else [])]
    extra = draw(st.sampled_from(extras))
    if extra == "global_keys":
        call[extra] = draw(global_tokens(size.batch, size.kv_len))
    elif extra == "bias":
        bias = draw(biases(size, tensors, capabilities.bias))
        call[extra] = bias.values if bias.kind == "dense" and draw(st.booleans()) else bias
    elif extra == "mask":
        call[extra] = draw(masks(size, tensors))
    return call


def definition(call, dtype):
    """Return the output of a call by a dense softmax in ``dtype``, without segments. Leaves get gradients."""
    q, k, v = (call[name].to(dtype) for name in "qkv")
    (batch, heads, q_len, dim), kv_len = q.shape, k.shape[2]
    b, h, i, j = (torch.arange(size) for size in (batch, heads, q_len, kv_len))
    index = (b[:, None, None, None], h[:, None, None], i[:, None], j)
    key_head = h // (heads // k.shape[1])
    scale = dim**-0.5 if call["scale"] is None else call["scale"]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k[:, key_head]) * scale
    bias = call.get("bias")
    if bias is not None:
        scores = scores + (bias.gather(q_len, kv_len)(*index) if isinstance(bias, Bias) else bias).to(dtype)
    seen = call["pattern"].mask_mod(q_len, kv_len)(*index).expand(batch, heads, -1, -1)
    for name, allowed in (("global_keys", seen.logical_or), ("mask", seen.logical_and)):
        if call.get(name) is not None:
            mask = call[name]
            seen = allowed(mask if mask.ndim == 4 else mask[:, None, None])
    for name, shape in (("key_mask", (batch, 1, 1, -1)), ("query_mask", (batch, 1, -1, 1))):
        if call[name] is not None:
            seen = seen & call[name].view(shape)
    sees_a_key = seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen & sees_a_key, float("-inf")).softmax(-1) * sees_a_key
    return torch.einsum("bhqk,bhkd->bhqd", weights.to(dtype), v[:, key_head])


def computed_dtype(given, autocast):
    """Autocast changes every dtype except float64."""
    return given if autocast is None or given == torch.float64 else autocast


def is_refused(backend, pattern, dtype):
    """Whether the backend refuses a dtype, which autocast may have chosen. xformers has no windows in float32."""
    has_no_windows = backend.name == "xformers" and dtype == torch.float32
    return dtype not in backend.capabilities.dtypes or (has_no_windows and isinstance(pattern, Window))


@given(st.data(), st.sampled_from(AUTOCASTS), st.booleans(), st.booleans())
def test_attention_equals_a_dense_softmax(subject_or_oracle, data, autocast, by_name, are_small):
    subject = subject_or_oracle
    call = data.draw(calls(subject.backend.capabilities, **subject.limits))
    note({name: value for name, value in call.items() if name != "q"})
    named = subject.backend.name if by_name and subject.backend == registry.make_backend(subject.backend.name) else None
    casting = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    leaves = [tensor for name, tensor in call.items() if name in ("q", "k", "v", "bias") and tensor is not None]
    leaves = [leaf.values if isinstance(leaf, Bias) else leaf for leaf in leaves]
    leaves = [leaf for leaf in leaves if leaf.requires_grad] if subject.grad else []
    with torch.set_grad_enabled(subject.grad), casting, block_sizes(are_small):
        try:
            output = attnzoo.attention(**call, backend=named or subject.backend)
        except attnzoo.BackendRefusedError:
            assert is_refused(subject.backend, call["pattern"], computed_dtype(call["q"].dtype, autocast))
            return
        grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True, materialize_grads=True) if leaves else []
    dtype = computed_dtype(call["q"].dtype, autocast)
    assert output.dtype == dtype
    rounded = {**call, **{name: call[name].detach().to(dtype) for name in "qkv"}}
    plain_in = plain_dtype(dtype)  # plain operations in float64 would equal the reference and have no error
    reference, plain = (definition(rounded, kind).detach() for kind in (torch.float64, plain_in))
    assert_obeys_the_error_rule("output", output.detach(), reference, plain, dtype=dtype, plain_dtype=plain_in)
    if dtype == torch.float64 and leaves:
        expected = torch.autograd.grad(definition(call, dtype).sum(), leaves, allow_unused=True, materialize_grads=True)
        largest = max(1.0, *(float(grad.abs().max()) for grad in expected))
        for got, exact in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, exact, rtol=0.0, atol=1e-11 * largest)


def test_full_is_the_default_pattern():
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)
    assert torch.equal(attnzoo.attention(q, k, v), attnzoo.attention(q, k, v, Full()))
