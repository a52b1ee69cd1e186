"""What ``flash_attention_2`` passes to its kernels: packed rows, window extents, heads, scales."""

import functools
from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo.backends.varlen import flash_attn_kernel
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.spec.patterns import SortedChunks
from attnzoo.testing import AttentionCase
from tests.support.half import HALF, agrees, attention, unpadded


def ran(flash_attn, whole):
    flash_attn.CALLS.clear()
    result = FlashBackend().run(whole)
    assert result.kernel == "flash_attn"
    return [(name, given) for name, given in flash_attn.CALLS], result.output


def test_a_single_call_uses_the_public_function(flash_attn):
    for pattern, causal, window in (
        (attnzoo.Full(), False, (-1, -1)),
        (attnzoo.Causal(), True, (-1, 0)),
        (attnzoo.Window(4, 3), False, (4, 3)),
        (attnzoo.Window(4, 0), False, (4, 0)),
    ):
        [(name, given)], _ = ran(flash_attn, attention(pattern))
        assert name == "func" and given["causal"] == causal and given["window"] == window
        assert given["cu_q"].tolist() == given["cu_k"].tolist() == [0, 20, 40]


def test_padding_is_left_out_of_the_packed_rows(flash_attn):
    mask = unpadded(13, 7)
    for pattern in (attnzoo.Full(), attnzoo.Causal(), attnzoo.Window(4, 4)):
        [(name, given)], _ = ran(flash_attn, attention(pattern, key_mask=mask, query_mask=mask))
        assert name == "func"
        assert given["cu_q"].tolist() == given["cu_k"].tolist() == [0, 13, 20]
        assert given["q"].shape[0] == given["k"].shape[0] == 20


@pytest.mark.parametrize("pattern", [attnzoo.Causal(), attnzoo.Window(9, 7), attnzoo.Window(2, 9)], ids=str)
@pytest.mark.parametrize("kernel", [None, "varlen"])
def test_a_short_sample_in_a_long_batch_keeps_its_window(flash_attn, varlen, pattern, kernel):
    """Kernels treat an extent >= the longest sequence of keys as no limit: see :func:`calls._cut`."""
    agrees(attention(pattern, key_mask=unpadded(6, 3)), FlashBackend(kernel=kernel))
    agrees(attention(pattern, key_mask=unpadded(20, 6).flip(1)), FlashBackend(kernel=kernel))


def test_a_sample_that_is_all_padding_is_in_no_call(flash_attn):
    [(_, given)], output = ran(flash_attn, attention(attnzoo.Full(), key_mask=unpadded(20, 0)))
    assert given["cu_q"].tolist() == [0, 20]
    assert (output[1] == 0).all()


def test_key_heads_are_not_repeated(flash_attn):
    [(_, given)], _ = ran(flash_attn, attention(attnzoo.Causal(), kv_heads=1))
    assert given["q"].shape[1:] == (2, 8) and given["k"].shape[1:] == (1, 8)


def test_an_odd_head_dim_is_padded_and_the_scale_kept(flash_attn):
    whole = attention(attnzoo.Full(), dim=12)
    [(_, given)], output = ran(flash_attn, whole)
    assert given["q"].shape[2] == 16 and output.shape[3] == 12
    agrees(whole, FlashBackend())


def test_aligned_rows_are_not_copied(flash_attn):
    query, key, value = (torch.randn(2, 20, 2, 8, dtype=HALF).transpose(1, 2) for _ in range(3))
    whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, attnzoo.Causal()),), 1.0)
    [(_, given)], _ = ran(flash_attn, whole)
    assert given["q"].data_ptr() == query.data_ptr() and given["k"].data_ptr() == key.data_ptr()


@pytest.mark.parametrize("width", [9, 16])
def test_rows_that_are_not_aligned_to_16_bytes_are_copied(flash_attn, width):
    query, key, value = (torch.randn(2, 20, 2, width).half()[..., 1:9].transpose(1, 2) for _ in range(3))
    unaligned = attnzoo.Attention(query, (attnzoo.Segment(key, value, attnzoo.Causal()),), 0.3)
    aligned = unaligned.with_tensors(tuple(tensor.contiguous() for tensor in unaligned.tensors()))
    assert torch.equal(FlashBackend().run(unaligned).output, FlashBackend().run(aligned).output)


@pytest.mark.parametrize("kernel", ["flash_attn", "varlen"])
def test_more_sequences_than_the_grid_allows_become_several_calls(flash_attn, varlen, kernel):
    key, value = (torch.randn(2, 1, 33000, 8, dtype=HALF) for _ in range(2))
    segment = attnzoo.Segment(key, value, attnzoo.Chunks(1, 0, 0))
    output = FlashBackend(kernel=kernel).run(attnzoo.Attention(key, (segment,), 1.0)).output
    assert torch.equal(output, value)


def test_no_kernel_runs_if_no_query_sees_a_key(flash_attn):
    whole = attention(attnzoo.Causal(), key_mask=unpadded(0, 0), grad=True)
    flash_attn.CALLS.clear()
    result = FlashBackend().run(whole)
    result.output.sum().backward()
    assert (result.kernel, flash_attn.CALLS) == ("none", [])
    assert (result.output == 0).all() and (whole.query.grad == 0).all()


def test_window_and_globals_are_united_and_each_backward_gets_the_final_lse(flash_attn):
    whole = attention(attnzoo.Window(4, 4), grad=True)
    (window,) = whole.segments
    globals_ = attnzoo.Segment(window.key[:, :, :2], window.value[:, :, :2])
    whole = replace(whole, segments=(window, globals_))
    calls, output = ran(flash_attn, whole)
    assert [(name, given["window"]) for name, given in calls] == [("forward", (4, 4)), ("forward", (-1, -1))]
    assert [given["cu_k"].tolist() for _, given in calls] == [[0, 20, 40], [0, 2, 4]]
    flash_attn.CALLS.clear()
    output.sum().backward()
    first, second = (given for name, given in flash_attn.CALLS if name == "backward")
    assert torch.equal(first["lse"], second["lse"])
    keys = torch.cat([window.key, globals_.key], dim=2).float()
    scores = whole.query.float() @ keys.transpose(-1, -2) * whole.scale
    seen = torch.cat([(torch.arange(20)[:, None] - torch.arange(20)).abs() <= 4, torch.ones(20, 2).bool()], dim=1)
    true = scores.masked_fill(~seen, -torch.inf).logsumexp(-1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(first["lse"], true, atol=1e-5, rtol=0.0)


def test_lsh_rounds_become_causal_calls(flash_attn):
    whole = AttentionCase(HALF, SortedChunks(8, 1, 0, causal=True), q_len=16, kv_len=16, grad=False).attention()
    calls, _ = ran(flash_attn, whole)
    assert [given["causal"] for _, given in calls] == [True] * len(calls)
    assert {given["q"].shape[1] for _, given in calls} == {1}  # each head has another order
    both = AttentionCase(HALF, SortedChunks(8, 1, 0), q_len=16, kv_len=16, grad=False).attention()
    assert len(ran(flash_attn, both)[0]) == 2 * len(calls)  # earlier tokens, and later tokens


def test_sorted_segments_mix_with_others(flash_attn):
    """Only calls of sorted segments use the spare row. The fake checks that the lengths sum to the number of rows."""
    whole = AttentionCase(HALF, SortedChunks(8, 1, 0, causal=True), q_len=16, kv_len=16).attention()
    few, every = (torch.randn((*whole.query.shape[:2], n, whole.head_dim)).to(HALF) for n in (5, 16))
    others = (attnzoo.Segment(few, few), attnzoo.Segment(every, every, attnzoo.Causal()))
    agrees(attnzoo.Attention(whole.query, (*whole.segments, *others), whole.scale), FlashBackend())


def test_the_flash_attn_kernel_comes_before_the_one_of_torch(flash_attn, varlen, monkeypatch):
    whole = attention(attnzoo.Causal())
    assert FlashBackend().run(whole).kernel == "flash_attn"
    assert FlashBackend(kernel="varlen").run(whole).kernel == "varlen"
    monkeypatch.setattr(flash_attn_kernel.FlashAttnKernel, "unavailable", classmethod(lambda cls: "gone"))
    assert FlashBackend().run(whole).kernel == "varlen"


def test_deterministic_algorithms_are_requested_from_the_kernel(flash_attn, monkeypatch):
    requested, original = [], flash_attn.flash_attn_varlen_func

    @functools.wraps(original)
    def record(*args, **kwargs):
        requested.append(kwargs["deterministic"])
        return original(*args, **kwargs)

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", record)
    FlashBackend().run(attention(attnzoo.Full()))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    FlashBackend().run(attention(attnzoo.Full()))
    assert requested == [False, True]


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_backward_of_a_union_is_as_deterministic_as_requested(flash_attn, monkeypatch, deterministic):
    whole = attention(attnzoo.Window(4, 4), grad=True)
    _, output = ran(flash_attn, replace(whole, segments=whole.segments * 2))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    output.sum().backward()
    assert [given["deterministic"] for name, given in flash_attn.CALLS if name == "backward"] == [deterministic] * 2
