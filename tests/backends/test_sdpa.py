"""``sdpa``: public calls of PyTorch, with their masks, offsets and scales."""

from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo.backends.sdpa import flash_cpu
from attnzoo.conformance.attention_check import check_attention
from attnzoo.registry import registry
from attnzoo.spec.patterns import Causal, Full, Window


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("pattern", [attnzoo.Full(), attnzoo.Causal(), attnzoo.Window(3, 2)], ids=str)
def test_the_scale_may_be_zero_or_negative(pattern, scale):
    """The CPU kernel hides later keys by -inf before scaling, which is wrong for such a scale."""
    query, key, value = (torch.randn(2, 3, 9, 8) for _ in range(3))
    whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, pattern),), scale)
    report = check_attention("case", whole, registry.make_backend("sdpa"), grad=True)
    assert report.ok, report


WITH_HIDDEN_ROWS = {
    "one masked call": Full(),
    "a key mask of causal attention": Causal(),
    "causal with more queries than keys": Causal(-4),
    "window": Window(2, 1),
}


@pytest.mark.parametrize("pattern", WITH_HIDDEN_ROWS.values(), ids=WITH_HIDDEN_ROWS)
@pytest.mark.parametrize("value_dim", [8, 11], ids=["fused", "uneven"])
@pytest.mark.parametrize("with_empty", [True, False], ids=["empty", "zero"])
def test_a_kernel_never_gets_a_row_without_keys(monkeypatch, pattern, value_dim, with_empty):
    """Kernels disagree on such rows: some return NaN."""
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []

    def strict(*args, attn_mask=None, **kwargs):
        assert attn_mask is None or bool((attn_mask > float("-inf")).any(-1).all())
        calls.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", strict)
    monkeypatch.setattr(flash_cpu, "unavailable", lambda: "this test wants public calls")
    query, key, value = (torch.randn(2, 3, 90, dim) for dim in (8, 8, value_dim))
    key_mask = torch.arange(90) >= torch.tensor([[0], [40]])
    key_mask[1, 60:] = False
    empty = torch.randn(2, 3, 90, value_dim) if with_empty else None
    for masks in (key_mask, key_mask & torch.tensor([[True], [False]])):
        whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, pattern, masks),), 0.3, empty=empty)
        report = check_attention("case", whole, registry.make_backend("sdpa"), grad=True)
        assert report.ok, report
    assert calls


ONE_QUERY = {
    "nothing": {},
    "key mask": dict(key_mask=torch.tensor([[False] * 3 + [True] * 9, [True] * 12])),
    "a sample without keys": dict(key_mask=torch.tensor([[False] * 12, [True] * 12])),
    "mask": dict(mask=torch.arange(24).reshape(2, 1, 1, 12) % 3 > 0),
    "mask per head": dict(mask=torch.arange(48).reshape(1, 4, 1, 12) % 3 > 0),
    "relative bias": dict(bias=attnzoo.RelativeBias(torch.linspace(-2, 2, 28).reshape(4, 7), 6)),
    "dense bias": dict(bias=attnzoo.DenseBias(torch.linspace(-2, 2, 48).reshape(1, 4, 1, 12))),
    "bias and key mask": dict(
        bias=attnzoo.RelativeBias(torch.linspace(-2, 2, 7).reshape(1, 7), 3, offset=9),
        key_mask=torch.tensor([[False] * 3 + [True] * 9, [True] * 12]),
    ),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("pattern", [Full(), Causal()], ids=str)
@pytest.mark.parametrize("name", ONE_QUERY)
def test_a_decoding_step_is_one_kernel_call_without_copies_of_keys(monkeypatch, name, pattern, kv_heads):
    query = torch.randn(2, 4, 1, 8)
    key, value = (torch.randn(2, kv_heads, 12, 8) for _ in range(2))
    whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, pattern, **ONE_QUERY[name]),), 0.3)
    calls, call = [], flash_cpu.call

    def record(query, key, value, terms):
        calls.append((key, value))
        return call(query, key, value, terms)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(flash_cpu, "call", record)
        assert registry.make_backend("sdpa").run(whole).kernel == "flash"
    ((given_key, given_value),) = calls
    if kv_heads != 2 or name not in ("mask per head", "relative bias", "dense bias"):  # these differ between heads
        assert given_key.data_ptr() == key.data_ptr() and given_value.data_ptr() == value.data_ptr()
    report = check_attention("case", whole, registry.make_backend("sdpa"), grad=False)
    assert report.ok, report


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("terms", ["relative bias", "mask per head", "key mask"])
def test_one_query_gets_gradients(terms, dropout):
    """A trained bias gets a gradient, too. With dropout, the comparison uses the same dropped weights."""
    query = torch.randn(2, 4, 1, 8)
    key, value = (torch.randn(2, 2, 12, 8) for _ in range(2))
    whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, Full(), **ONE_QUERY[terms]),), 0.3)
    report = check_attention("case", replace(whole, dropout=dropout), registry.make_backend("sdpa"), grad=True)
    assert report.ok, report


OFFSETS = (None, -3, 0, 2, 5)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(9, 9), (9, 14), (14, 9), (1, 9)])
@pytest.mark.parametrize("hides", [False, True], ids=["", "key mask"])
@pytest.mark.parametrize("value_dim", [8, 11, 5], ids=["fused", "wider values", "narrower values"])
def test_causal_attention_keeps_its_offset_and_its_key_mask(offset, q_len, kv_len, hides, value_dim):
    """PyTorch's ``is_causal`` supports neither an offset nor a key mask."""
    query = torch.randn(2, 3, q_len, 8)
    key, value = (torch.randn(2, 3, kv_len, dim) for dim in (8, value_dim))
    key_mask = torch.arange(kv_len) != torch.tensor([[1], [5]]) if hides else None
    whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, Causal(offset), key_mask),), 0.3)
    report = check_attention("case", whole, registry.make_backend("sdpa"), grad=True)
    assert report.ok, report


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(5, 3)], ids=str)
def test_narrower_values_use_no_kernel_for_equal_dimensions(pattern):
    query, key, value = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 70, 8), torch.randn(2, 2, 70, 5)
    whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, pattern),) * 2, 0.3)
    for attention in (whole, replace(whole, segments=whole.segments[:1])):
        report = check_attention("case", attention, registry.make_backend("sdpa"), grad=True)
        assert report.ok and report.kernel == "math", report


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("pattern", [Full(), Window(5, 3)], ids=str)
@pytest.mark.parametrize("value_dim", [8, 11], ids=["fused", "uneven"])
def test_a_trained_bias_gets_its_gradient_from_public_calls(monkeypatch, pattern, grad, value_dim):
    monkeypatch.setattr(flash_cpu, "unavailable", lambda: "this test wants public calls")
    query, key, value = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 70, 8), torch.randn(2, 2, 70, value_dim)
    for bias in (attnzoo.RelativeBias(torch.randn(4, 9), 4), attnzoo.DenseBias(torch.randn(1, 4, 70, 70))):
        bias.values.requires_grad_()
        whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, pattern, bias=bias),), 0.3)
        report = check_attention("case", whole, registry.make_backend("sdpa"), grad=grad)
        assert report.ok and report.kernel == ("math" if grad or value_dim != 8 else "flash"), report
