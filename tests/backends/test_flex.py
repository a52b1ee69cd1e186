"""``flex_attention``: one compilation per form, exact results, and its refusals."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters  # the compiler's count of graphs
from torch.fx.experimental.proxy_tensor import make_fx

import attnzoo
from attnzoo.backends.flex import backend as flex
from attnzoo.backends.flex import kernel as flex_kernel
from attnzoo.backends.flex.backend import FlexBackend
from attnzoo.conformance.attention_check import check_attention
from attnzoo.functional import execute
from attnzoo.spec.patterns import SortedChunks
from attnzoo.spec.segments import Attention, Segment

HEADS, DIM = 4, 16
needs_compiler = pytest.mark.skipif(
    not attnzoo.backends()["flex_attention"].available, reason=attnzoo.backends()["flex_attention"].reason
)


WINDOW = attnzoo.Window(40, 30)


def attention(length=150, kv_len=None, batch=2, pattern=WINDOW, bias=True, keys=True, kv_heads=HEADS):
    """A padded segment with a relative bias, and a second segment whose bias has query positions."""
    kv_len = length if kv_len is None else kv_len
    random = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    query, key, value = (normal(batch, n, size, DIM) for n, size in ((HEADS, length), *[(kv_heads, kv_len)] * 2))
    real = torch.ones((batch, kv_len), dtype=torch.bool)
    real[0, : kv_len // 3], real[-1, kv_len - kv_len // 4 :] = False, False
    relative = attnzoo.RelativeBias(normal(HEADS, 41), zero=20) if bias else None
    segments = [Segment(key, value, pattern, key_mask=real if keys else None, bias=relative)]
    few = -(-length // 7)
    positions = (torch.arange(length) // 7).expand(batch, -1)
    side = attnzoo.RelativeBias(normal(HEADS, 9), zero=4, positions=positions) if bias else None
    segments.append(Segment(normal(batch, kv_heads, few, DIM), normal(batch, kv_heads, few, DIM), bias=side))
    return Attention(query, tuple(segments), DIM**-0.5)


def agrees(whole):
    report = check_attention("flex", whole, FlexBackend(), grad=False, max_rows=1 << 30)
    return all(check.ok for check in report.checks)


@needs_compiler
def test_a_new_length_window_or_table_compiles_nothing():
    flex_kernel.compiled_kernel.cache_clear()  # earlier tests of the process may have compiled some forms
    assert agrees(attention(150))
    compiled = counters["stats"]["unique_graphs"]
    for length, pattern in (
        (64, attnzoo.Window(5, 0)),
        (333, attnzoo.Causal()),
        (17, attnzoo.Full()),
        (128, attnzoo.Full()),
    ):
        assert agrees(attention(length, pattern=pattern)), (length, pattern)
    assert agrees(attention(90, kv_len=200, pattern=attnzoo.Causal(), batch=3, keys=False))
    assert counters["stats"]["unique_graphs"] == compiled
    assert agrees(attention(100, bias=False))
    assert counters["stats"]["unique_graphs"] == compiled + 1, "no bias is another form"


@needs_compiler
@pytest.mark.parametrize(("batch", "length"), [(2, 70), (1, 1)])
def test_the_layout_of_queries_compiles_nothing(batch, length):
    """In models, queries are copies, views of a projection, or views of a joint projection with keys and values."""
    whole = attention(length, kv_len=70, pattern=attnzoo.Causal(), bias=False, batch=batch)
    rows = whole.query.transpose(1, 2).flatten(2)
    beside = torch.cat([rows, rows, rows], dim=2)[..., : HEADS * DIM]
    assert agrees(whole)
    compiled = counters["stats"]["unique_graphs"]
    for layout in (rows, beside, rows.transpose(0, 1).contiguous().transpose(0, 1)):
        assert agrees(replace(whole, query=layout.unflatten(2, (HEADS, DIM)).transpose(1, 2)))
    assert agrees(replace(whole, query=whole.query.mT.contiguous().mT))
    assert counters["stats"]["unique_graphs"] == compiled


@needs_compiler
def test_inference_mode_compiles_once_more_for_all_lengths():
    assert agrees(attention(150, bias=False))
    compiled = counters["stats"]["unique_graphs"]
    for length in (64, 333):  # the first has as many blocks as samples
        with torch.inference_mode():
            assert execute(FlexBackend(), attention(length, bias=False)).output.is_inference()
        assert agrees(attention(length, bias=False))
        assert counters["stats"]["unique_graphs"] == compiled + 1


@needs_compiler
def test_it_refuses_if_compilation_is_switched_off():
    """Uncompiled FlexAttention would make whole grids of scores."""
    whole = attention(150, bias=False)
    assert agrees(whole)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(attnzoo.BackendRefusedError, match=r"torch\.compile: got disabled.*allowed: enabled"),
    ):
        execute(FlexBackend(), whole)
    assert agrees(whole)


@needs_compiler
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_keys_chunks_and_single_queries_agree_with_eager(kv_heads):
    assert agrees(attention(61, pattern=attnzoo.Chunks(8, 1, 1), kv_heads=kv_heads))
    assert agrees(attention(61, pattern=attnzoo.Chunks(8, 1, 0, causal=True), kv_heads=kv_heads))
    assert agrees(attention(1, kv_len=70, pattern=attnzoo.Full(), batch=1, kv_heads=kv_heads))


@needs_compiler
def test_a_single_key_per_sample_agrees_with_eager():
    query, key = torch.randn(2, HEADS, 9, DIM), torch.randn(2, HEADS, 1, DIM)
    assert agrees(Attention(query, (Segment(key, key),), 0.3))


@needs_compiler
def test_rows_that_see_no_key_get_zero_or_empty():
    whole = attention(70, bias=False)
    local = replace(whole, segments=whole.segments[:1])
    key_mask = torch.ones((2, 70), dtype=torch.bool)
    key_mask[1] = False
    local = replace(local, segments=(replace(local.segments[0], key_mask=key_mask),))
    output = execute(FlexBackend(), local).output
    assert not output[1].any() and output[0].any()
    empty = torch.randn(2, HEADS, 70, DIM)
    assert torch.equal(execute(FlexBackend(), replace(local, empty=empty)).output[1], empty[1])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda whole: replace(whole, dropout=0.1), "dropout"),
        (lambda whole: replace(whole, query=whole.query.requires_grad_()), "grad"),
        (lambda whole: whole.with_tensors(tuple(tensor.double() for tensor in whole.tensors())), "dtype"),
    ],
    ids=["dropout", "backward on cpu", "float64"],
)
def test_refusals_name_the_backends_that_can(change, field):
    with pytest.raises(attnzoo.BackendRefusedError, match=f"{field}: got .*allowed.*") as caught:
        execute(FlexBackend(), change(attention()))
    assert "sdpa" in str(caught.value)


@pytest.mark.parametrize(("head_dim", "value_dim", "fits"), [(16, 16, True), (8, 16, False), (16, 8, False)])
def test_narrow_heads_are_refused_on_cuda(head_dim, value_dim, fits):
    request = replace(attention().request(), device="cuda", head_dim=head_dim, value_dim=value_dim)
    reasons = [str(reason) for reason in FlexBackend().refusals(request)]
    assert reasons == ([] if fits else ["head_dim: got 8; allowed: at least 16 on cuda"])


@pytest.mark.parametrize("trained", [True, False])
def test_trained_tables_are_read_by_index(monkeypatch, trained):
    """PyTorch's CUDA kernels compute the gradient of indexing, and of no other lookup."""
    whole, graphs = attention(), []
    key, value = flex._joined_keys_values(whole)
    form = flex._form(whole, whole.query, key, value)._replace(trained=(False, False, False, trained))

    def record(query, key, value, score_mod, *rest, **options):
        numbers = torch.zeros((4, 2), dtype=torch.long)
        graphs.append(make_fx(score_mod)(torch.zeros(2), *numbers).code)
        return query

    monkeypatch.setattr(flex_kernel, "flex_attention", record)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    flex_kernel.compiled_kernel.__wrapped__(form)
    (code,) = graphs
    assert ("aten.index" in code) == trained


def test_sorted_keys_are_refused():
    order = torch.arange(8).expand(1, 1, 8)
    query = torch.randn(1, 1, 8, 4)
    segment = Segment(query, query, SortedChunks(4, 1, 0, order=order, token=order.contiguous()))
    with pytest.raises(attnzoo.BackendRefusedError, match="pattern: got SortedChunks"):
        execute(FlexBackend(), Attention(query, (segment,), 1.0))


class Distance(attnzoo.RelativeBias):
    """A user's bias that falls with the distance without limit."""

    def gather(self, q_len, kv_len):
        return lambda b, h, q, kv: self.values[h, 0] * (q - kv).abs()


def test_a_subclass_of_a_bias_with_other_values_is_refused():
    whole = attention(bias=False)
    near, few = whole.segments
    biased = replace(whole, segments=(replace(near, bias=Distance(torch.randn(HEADS, 1), zero=0)), few))
    with pytest.raises(attnzoo.BackendRefusedError, match="bias: got Distance; allowed: RelativeBias itself"):
        FlexBackend().run(biased)
