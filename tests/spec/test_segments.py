"""Attentions as data: which tensors fit, for every segment; sampled rows; requests; the order of the tensors."""

from dataclasses import replace

import pytest
import torch

from attnzoo import InvalidArgumentError
from attnzoo.backends.eager import evaluate, log_mass
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.patterns import Causal, Chunks, Full, Window
from attnzoo.spec.segments import Attention, Segment

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 9, 9, 8


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def segment(kv_len=KV_LEN, kv_heads=2, value_dim=DIM, **terms):
    return Segment(normal(BATCH, kv_heads, kv_len, DIM), normal(BATCH, kv_heads, kv_len, value_dim), **terms)


def attention(*segments, **terms):
    return Attention(normal(BATCH, HEADS, Q_LEN, DIM), segments or (segment(),), 0.3, **terms)


def flags(*shape, dtype=torch.bool):
    return torch.ones(shape, dtype=dtype)


# Tensors that do not fit

FITS = {
    "all heads": segment(kv_heads=HEADS),
    "one head": segment(kv_heads=1),
    "another length": segment(5),
    "key mask": segment(5, key_mask=flags(BATCH, 5)),
    "mask": segment(5, mask=flags(1, HEADS, Q_LEN, 5)),
    "mask per sample": segment(5, mask=flags(BATCH, 1, Q_LEN, 5)),
    "chunks": segment(pattern=Chunks(4)),
    "bias": segment(5, bias=DenseBias(normal(1, HEADS, Q_LEN, 5))),
    "bias in float32": segment(5, bias=RelativeBias(normal(HEADS, 5, dtype=torch.float32), zero=0)),
}
key, short = normal(BATCH, 2, KV_LEN, DIM), normal(BATCH, 2, 5, DIM)
DOES_NOT_FIT = {
    "key batch": Segment(key[:1], key),
    "value batch": Segment(key, key[:1]),
    "key dtype": Segment(key.float(), key),
    "value dtype": Segment(key, key.half()),
    "key device": Segment(key.to("meta"), key),
    "value device": Segment(key, key.to("meta")),
    "value: fewer values than keys": Segment(key, short),
    "value: fewer value heads": Segment(key, key[:, :1]),
    "value: more value heads": Segment(key[:, :1], key),
    "key head_dim": Segment(key[..., :4], key),
    "key heads: no divisor": segment(kv_heads=3),
    "key heads: more than the query": segment(kv_heads=8),
    "value_dim": segment(value_dim=DIM + 1),
    "key: three dimensions": Segment(key[0], key),
    "value: no tensor": Segment(key, key.tolist()),
    "key: empty": Segment(key[:, :, :0], key[:, :, :0]),
    "key dtype: integers": Segment(key.long(), key.long()),
    "key: sparse": Segment(key.to_sparse(), key),
    "key_mask: another length": segment(5, key_mask=flags(BATCH, KV_LEN)),
    "key_mask: one sample": segment(5, key_mask=flags(1, 5)),
    "key_mask: integers": segment(5, key_mask=flags(BATCH, 5, dtype=torch.long)),
    "key_mask: floats": segment(5, key_mask=flags(BATCH, 5, dtype=torch.float64)),
    "key_mask device": segment(5, key_mask=flags(BATCH, 5).to("meta")),
    "mask: another length": segment(5, mask=flags(1, 1, Q_LEN, KV_LEN)),
    "mask: one query": segment(5, mask=flags(1, 1, 1, 5)),
    "mask: key heads": segment(5, mask=flags(1, 2, Q_LEN, 5)),
    "mask: more samples": segment(5, mask=flags(BATCH + 1, 1, Q_LEN, 5)),
    "mask: floats": segment(5, mask=flags(1, 1, Q_LEN, 5, dtype=torch.float64)),
    "mask device": segment(5, mask=flags(1, 1, Q_LEN, 5).to("meta")),
    "pattern: chunks of another length": segment(5, pattern=Chunks(4)),
    "bias: of the first segment": segment(5, bias=DenseBias(normal(1, HEADS, Q_LEN, KV_LEN))),
    "bias: table of the key heads": segment(bias=RelativeBias(normal(2, 5), zero=0)),
    "bias values: a mask": segment(bias=DenseBias(flags(1, 1, Q_LEN, KV_LEN))),
    "bias device": segment(bias=RelativeBias(normal(1, 5).to("meta"), zero=0)),
}
first_or_second = pytest.mark.parametrize("number", [0, 1, 2], ids=["first", "second", "third"])


@first_or_second
@pytest.mark.parametrize("fitting", FITS.values(), ids=FITS)
def test_a_segment_that_fits_is_accepted_at_any_place(fitting, number):
    segments = [segment(), segment(), segment()]
    segments[number] = fitting
    attention(*segments)


@first_or_second
@pytest.mark.parametrize("case", DOES_NOT_FIT)
def test_a_segment_that_does_not_fit_is_refused_at_any_place(case, number):
    if case == "value_dim" and number == 0:
        return  # the first segment decides the value_dim
    segments = [segment(), segment(), segment()]
    segments[number] = DOES_NOT_FIT[case]
    with pytest.raises(InvalidArgumentError, match=rf"^{case.partition(':')[0]}: got .*; allowed: "):
        attention(*segments)


EMPTY = normal(BATCH, HEADS, Q_LEN, DIM)


@pytest.mark.parametrize(
    ("terms", "argument"),
    [
        (dict(empty=EMPTY.float()), "empty"),
        (dict(empty=EMPTY[..., :4]), "empty"),
        (dict(empty=EMPTY[:, :1]), "empty"),
        (dict(empty=EMPTY.to("meta")), "empty"),
        (dict(query_mask=flags(BATCH, Q_LEN, dtype=torch.long)), "query_mask"),
        (dict(query_mask=flags(1, Q_LEN)), "query_mask"),
        (dict(query_mask=flags(BATCH, Q_LEN - 1)), "query_mask"),
        (dict(query_mask=flags(BATCH, Q_LEN).to("meta")), "query_mask device"),
        (dict(dropout=1.0), "dropout"),
        (dict(dropout=-0.1), "dropout"),
        (dict(dropout=True), "dropout"),
    ],
)
def test_a_term_that_does_not_fit_is_refused(terms, argument):
    attention(empty=EMPTY, query_mask=flags(BATCH, Q_LEN), dropout=0.999)
    with pytest.raises(InvalidArgumentError, match=f"^{argument}: got .*; allowed: "):
        attention(**terms)


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), "1", None, True])
def test_a_scale_that_is_no_finite_number_is_refused(scale):
    with pytest.raises(InvalidArgumentError, match=r"^scale: got .*; allowed: a finite number"):
        replace(attention(), scale=scale)


def test_an_attention_needs_a_segment():
    with pytest.raises(InvalidArgumentError, match=r"^segments: got \(\)"):
        replace(attention(), segments=())


# Sampled rows


def whole_attention():
    """Return an attention with padding queries, rows that see no key, a bias per row, and two segments."""
    hides = flags(BATCH, KV_LEN)
    hides[0, 3:] = False
    hides[1, :7] = False
    odd = torch.arange(Q_LEN)[:, None] % 2 == 1
    dense = ((torch.rand(BATCH, HEADS, Q_LEN, 4) < 0.5) | (torch.arange(4) == 2)) & odd
    table, values = RelativeBias(normal(HEADS, 3), zero=1), DenseBias(normal(BATCH, HEADS, Q_LEN, 4))
    segments = (segment(pattern=Window(1, 1), key_mask=hides, bias=table), segment(4, mask=dense, bias=values))
    query_mask = (torch.arange(Q_LEN) % 3 != 2).expand(BATCH, -1)
    return attention(*segments, query_mask=query_mask, empty=EMPTY)


@pytest.mark.parametrize("with_empty", [True, False])
def test_sampled_rows_equal_the_rows_of_the_whole_attention(with_empty):
    whole, rows = whole_attention(), torch.tensor([2, 3, 4, 8])
    whole = whole if with_empty else replace(whole, empty=None)
    result, sample = evaluate(whole), evaluate(whole, rows)
    seen = torch.cat([s.visible(torch.arange(Q_LEN), torch.arange(s.kv_len), Q_LEN).expand(-1, HEADS, -1, -1)
                      for s in whole.segments], dim=-1).any(-1)  # fmt: skip
    kinds = torch.stack([seen[:, 0], whole.query_mask])[:, :, rows].flatten(1)
    assert len(set(zip(*kinds.tolist(), strict=True))) == 4, "rows with and without keys, padding or not"
    torch.testing.assert_close(sample.output, result.output[:, :, rows])
    for sampled, all_rows in zip(sample.probabilities, result.probabilities, strict=True):
        torch.testing.assert_close(sampled, all_rows[:, :, rows])
    torch.testing.assert_close(log_mass(whole, rows), log_mass(whole, torch.arange(Q_LEN))[:, :, rows])


def test_fill_takes_empty_and_query_mask_from_the_given_rows():
    whole = replace(attention(), query_mask=torch.arange(Q_LEN).expand(BATCH, -1) != 7, empty=EMPTY)
    rows, computed = torch.tensor([6, 7, 8]), normal(BATCH, HEADS, 3, DIM)
    sees = torch.tensor([False, True, True]).expand(BATCH, HEADS, -1)
    filled = whole.fill(computed, sees, rows)
    assert torch.equal(filled[:, :, 0], EMPTY[:, :, 6])
    assert not filled[:, :, 1].any() and torch.equal(filled[:, :, 2], computed[:, :, 2])
    assert torch.equal(whole.fill(computed, None, rows)[:, :, 0], computed[:, :, 0])


def test_dropout_drops_whole_rows_of_empty_at_its_rate():
    empty = torch.ones(50, 4, 50, 3)
    query = torch.zeros(50, 4, 50, 3)
    hidden = Segment(query, query, key_mask=torch.zeros(50, 50, dtype=torch.bool))
    output = evaluate(Attention(query, (hidden,), 1.0, dropout=0.2, empty=empty)).output
    rows = output[..., 0]
    assert torch.equal(output, rows[..., None].expand_as(output)), "a row is dropped or kept as a whole"
    assert torch.equal(rows.unique(), torch.tensor([0.0, 1.25]))
    assert abs(float((rows == 0).float().mean()) - 0.2) < 0.02


# Requests and tensors


def test_a_request_names_the_properties_of_each_segment():
    table = RelativeBias(normal(HEADS, 3).requires_grad_(), zero=1)
    second = segment(4, HEADS, key_mask=flags(BATCH, 4), mask=flags(1, 1, Q_LEN, 4), bias=table)
    whole = attention(segment(pattern=Causal()), second, dropout=0.1)
    request = whole.request(probabilities=True)
    first, last = request.segments
    assert (first.pattern, first.kv_heads, first.key_mask, first.mask, first.bias, first.bias_grad) == (
        *(Causal(), 2, False, False, None, False),
    )
    assert (last.pattern, last.kv_heads, last.key_mask, last.mask, last.bias, last.bias_grad) == (
        *(Full(), HEADS, True, True, "relative", True),
    )
    assert (request.device, request.dtype, request.heads) == ("cpu", torch.float64, HEADS)
    assert (request.head_dim, request.value_dim, request.dropout, request.probabilities) == (DIM, DIM, True, True)
    assert request.grad
    with torch.no_grad():
        assert not whole.request().grad and not whole.request().segments[1].bias_grad
    assert not whole.request().probabilities and not attention().request().dropout


@pytest.mark.parametrize("number", range(8))
def test_any_tensor_that_requires_grad_makes_the_request_require_grad(number):
    whole = whole_attention()
    assert len(whole.tensors()) == 8 and not whole.request().grad
    tensors = [tensor.requires_grad_(place == number) for place, tensor in enumerate(map(torch.clone, whole.tensors()))]
    assert whole.with_tensors(tuple(tensors)).request().grad


def test_tensors_are_replaced_in_their_order():
    whole = whole_attention()
    tensors = tuple(tensor + 1.0 for tensor in whole.tensors())
    changed = whole.with_tensors(tensors)
    assert all(new is tensor for new, tensor in zip(changed.tensors(), tensors, strict=True))
    (a, b), (c, d) = whole.segments, changed.segments
    expected = [whole.query, a.key, a.value, a.bias.values, b.key, b.value, b.bias.values, whole.empty]
    got = [changed.query, c.key, c.value, c.bias.values, d.key, d.value, d.bias.values, changed.empty]
    assert all(torch.equal(new, old + 1.0) for new, old in zip(got, expected, strict=True))
    assert (d.mask is b.mask, c.key_mask is a.key_mask, d.bias.kind, c.bias.zero) == (True, True, "dense", 1)
