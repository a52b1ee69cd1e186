"""Biases by definition in plain loops: values, gradients of blocks, tiles with equal keys, and refused arguments."""

import itertools

import pytest
import torch

from attnzoo import InvalidArgumentError, attention
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.patterns import Tile
from attnzoo.spec.segments import Attention, Segment

BATCH, HEADS, Q_LEN, KV_LEN = 2, 3, 7, 10


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


POSITIONS = torch.tensor([[0, 9, 4, 4, 1, 7, 2], [3, 3, 3, 12, -4, 8, 0]])
BIASES = {
    "short table": RelativeBias(values(HEADS, 4), zero=2),
    "distance 0 first": RelativeBias(values(HEADS, 3), zero=0),
    "distance 0 last": RelativeBias(values(HEADS, 3), zero=2),
    "one value": RelativeBias(values(HEADS, 1), zero=0),
    "long table": RelativeBias(values(HEADS, 41), zero=20),
    "heads share the table": RelativeBias(values(1, 5), zero=3),
    "offset 0": RelativeBias(values(HEADS, 6), zero=3, offset=0),
    "offset 2": RelativeBias(values(HEADS, 6), zero=3, offset=2),
    "offset -3": RelativeBias(values(1, 6), zero=3, offset=-3),
    "positions": RelativeBias(values(HEADS, 6), zero=3, positions=POSITIONS),
    "positions, shared table": RelativeBias(values(1, 4), zero=1, positions=POSITIONS),
    "dense": DenseBias(values(BATCH, HEADS, Q_LEN, KV_LEN)),
    "dense per sample": DenseBias(values(BATCH, 1, Q_LEN, KV_LEN)),
    "dense per head": DenseBias(values(1, HEADS, Q_LEN, KV_LEN)),
    "dense for all": DenseBias(values(1, 1, Q_LEN, KV_LEN)),
}
every_bias = pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)


def entry(bias, b, h, q, k):
    """Return the index into ``bias.values`` of the value that the definition adds to a score."""
    if isinstance(bias, DenseBias):
        return (b if len(bias.values) > 1 else 0, h if bias.values.shape[1] > 1 else 0, q, k)
    if bias.positions is not None:
        position = int(bias.positions[b, q])
    else:
        position = q + (KV_LEN - Q_LEN if bias.offset is None else bias.offset)
    return (h if len(bias.values) > 1 else 0, min(max(k - position + bias.zero, 0), bias.values.shape[1] - 1))


def definition(bias):
    """Return the bias ``(BATCH, HEADS, Q_LEN, KV_LEN)``."""
    sizes = (BATCH, HEADS, Q_LEN, KV_LEN)
    entries = [entry(bias, *index) for index in itertools.product(*map(range, sizes))]
    return torch.stack([bias.values[index] for index in entries]).view(sizes)


def segment_of(bias):
    key = torch.zeros(BATCH, HEADS, KV_LEN, 4, dtype=torch.float64)
    segment = Segment(key, key, bias=bias)
    Attention(key[:, :, :Q_LEN], (segment,), 1.0)  # raises if the bias does not fit
    return segment


@every_bias
@pytest.mark.parametrize("rows", [torch.arange(Q_LEN), torch.tensor([5, 0, 6])], ids=["all rows", "some rows"])
@pytest.mark.parametrize("keys", [slice(0, KV_LEN), slice(4, 9)], ids=["all keys", "some keys"])
def test_a_bias_agrees_with_the_definition(bias, rows, keys):
    got = segment_of(bias).bias_at(rows, torch.arange(KV_LEN)[keys], Q_LEN)
    assert torch.equal(got.expand(BATCH, HEADS, -1, -1), definition(bias)[:, :, rows, keys])


@every_bias
def test_a_bias_of_reordered_queries_agrees_with_the_definition(bias):
    order = torch.rand(BATCH, HEADS, Q_LEN).argsort(-1)[..., :5]
    got = segment_of(bias).bias_at(order, torch.arange(KV_LEN), Q_LEN)
    expected = definition(bias).gather(2, order[..., None].expand(-1, -1, -1, KV_LEN))
    assert torch.equal(got.expand(expected.shape), expected)


@every_bias
def test_score_mod_adds_the_definition_to_the_score(bias):
    b, h, q, kv = torch.meshgrid(*map(torch.arange, (BATCH, HEADS, Q_LEN, KV_LEN)), indexing="ij")
    got = bias.score_mod(Q_LEN, KV_LEN)(torch.tensor(2.0, dtype=torch.float64), b, h, q, kv)
    assert torch.equal(got, definition(bias) + 2.0)


@every_bias
def test_the_gradient_of_blocks_is_the_gradient_of_the_definition(bias):
    grad_scores = torch.randn(BATCH, HEADS, Q_LEN, KV_LEN, dtype=torch.float64)
    expected, got = (torch.zeros_like(bias.values) for _ in range(2))
    for index in itertools.product(*map(range, grad_scores.shape)):
        expected[entry(bias, *index)] += grad_scores[index]
    for q, kv in itertools.product(torch.arange(Q_LEN).split(3), torch.arange(KV_LEN).split(4)):
        block = grad_scores[:, :, int(q[0]) : int(q[-1]) + 1, int(kv[0]) : int(kv[-1]) + 1]
        bias.add_gradient_(got, block, q, kv, Q_LEN, KV_LEN)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("heads_share", [True, False])
@pytest.mark.parametrize("positions", [None, torch.arange(200).expand(2, -1)], ids=["distances", "positions"])
def test_the_gradient_of_a_value_has_few_roundings(positions, heads_share):
    """One value gets the sum of tens of thousands of gradients of both signs."""
    size, heads = 200, 3
    table = torch.zeros((1 if heads_share else heads, 2), requires_grad=True)
    bias = RelativeBias(table, zero=1, positions=positions)
    index = torch.arange(size)
    values = bias.block(index, index, size, size)
    grad = torch.randn((2, heads, size, size), generator=torch.Generator().manual_seed(0))
    (got,) = torch.autograd.grad(values.expand_as(grad), table, grad)
    before = index < index[:, None]
    expected = torch.stack([(grad.double() * where).sum((0, 2, 3)) for where in (before, ~before)], dim=1)
    expected = expected.sum(0, keepdim=True) if heads_share else expected
    assert (got - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_one_query_with_a_trained_table_has_a_second_derivative():
    """It is one call of PyTorch's attention, as without a gradient."""
    table = torch.randn((2, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    q, k, v = torch.randn((3, 1, 2, 9, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradient_norm(backend):
        output = attention(q[:, :, :1], k, v, bias=RelativeBias(table, zero=4), backend=backend)
        (first,) = torch.autograd.grad(output.square().sum(), table, create_graph=True)
        return torch.autograd.grad(first.square().sum(), table)[0]

    torch.testing.assert_close(gradient_norm("sdpa"), gradient_norm("eager"))


@every_bias
def test_tiles_with_equal_keys_have_equal_biases(bias):
    whole, known = definition(bias), {}
    for q, k in itertools.product(range(0, Q_LEN, 2), range(0, KV_LEN, 2)):
        tile = Tile(q, min(Q_LEN, q + 2), k, min(KV_LEN, k + 2), Q_LEN, KV_LEN)
        key, block = bias.block_key(tile), whole[:, :, q : q + 2, k : k + 2]
        if key is not None:
            assert torch.equal(known.setdefault(key, block), block)


def test_blocks_along_the_diagonal_share_a_key():
    bias = BIASES["short table"]
    assert len({bias.block_key(Tile(n, n + 4, n - 2, n + 6, 64, 64)) for n in range(4, 56, 4)}) == 1


ALLOWED = {
    "table of all heads": RelativeBias(torch.zeros(HEADS, 4), zero=0),
    "shared table, last zero": RelativeBias(torch.zeros(1, 4), zero=3),
    "positions": RelativeBias(torch.zeros(1, 4), zero=3, positions=POSITIONS),
    "dense": DenseBias(torch.zeros(BATCH, HEADS, Q_LEN, KV_LEN)),
    "dense for all": DenseBias(torch.zeros(1, 1, Q_LEN, KV_LEN)),
}
REFUSED = {
    "zero past the table": RelativeBias(torch.zeros(HEADS, 4), zero=4),
    "negative zero": RelativeBias(torch.zeros(HEADS, 4), zero=-1),
    "zero is a bool": RelativeBias(torch.zeros(HEADS, 4), zero=True),
    "too few heads": RelativeBias(torch.zeros(HEADS - 1, 4), zero=0),
    "table with a batch": RelativeBias(torch.zeros(1, HEADS, 4), zero=0),
    "offset is a float": RelativeBias(torch.zeros(HEADS, 4), zero=0, offset=1.0),
    "offset is a bool": RelativeBias(torch.zeros(HEADS, 4), zero=0, offset=True),
    "int32 positions": RelativeBias(torch.zeros(1, 4), zero=3, positions=POSITIONS.int()),
    "positions of one sample": RelativeBias(torch.zeros(1, 4), zero=3, positions=POSITIONS[:1]),
    "positions of too few queries": RelativeBias(torch.zeros(1, 4), zero=3, positions=POSITIONS[:, 1:]),
    "positions on another device": RelativeBias(torch.zeros(1, 4), zero=3, positions=POSITIONS.to("meta")),
    "positions are a list": RelativeBias(torch.zeros(1, 4), zero=3, positions=POSITIONS.tolist()),
    "integer table": RelativeBias(torch.zeros(HEADS, 4, dtype=torch.long), zero=0),
    "dense of another batch": DenseBias(torch.zeros(BATCH + 1, HEADS, Q_LEN, KV_LEN)),
    "dense of other heads": DenseBias(torch.zeros(BATCH, HEADS - 1, Q_LEN, KV_LEN)),
    "dense with one query": DenseBias(torch.zeros(1, 1, 1, KV_LEN)),
    "dense with one key": DenseBias(torch.zeros(1, 1, Q_LEN, 1)),
    "dense without a batch": DenseBias(torch.zeros(HEADS, Q_LEN, KV_LEN)),
    "bool mask": DenseBias(torch.zeros(1, 1, Q_LEN, KV_LEN, dtype=torch.bool)),
    "list": DenseBias([0.0]),
    "table on another device": RelativeBias(torch.zeros(HEADS, 4, device="meta"), zero=0),
}


@pytest.mark.parametrize("bias", ALLOWED.values(), ids=ALLOWED)
def test_biases_at_the_limits_are_allowed(bias):
    segment_of(bias)


@pytest.mark.parametrize("bias", REFUSED.values(), ids=REFUSED)
def test_a_bias_that_does_not_fit_is_refused(bias):
    with pytest.raises(InvalidArgumentError, match=r"bias.*: got .*; allowed: "):
        segment_of(bias)


@pytest.mark.parametrize("offset", [None, 0, 3, -2, 30])
@pytest.mark.parametrize(("q_len", "query"), [(1, 0), (5, 0), (5, 4)])
def test_the_row_of_one_query_is_a_row_of_the_bias(offset, q_len, query):
    kv_len = 9
    index = torch.arange(kv_len)[None, None, None], torch.tensor([query])[None, None, :, None]
    sample, head = torch.arange(2)[:, None, None, None], torch.arange(3)[None, :, None, None]
    for bias in (
        RelativeBias(torch.randn(3, 7), 4, offset), RelativeBias(torch.randn(1, 1), 0, offset),
        DenseBias(torch.randn(2, 1, q_len, kv_len)),
    ):  # fmt: skip
        expected = bias.gather(q_len, kv_len)(sample, head, index[1], index[0])
        row = bias.of_query(query, q_len, kv_len)
        assert row.shape[2:] == (1, kv_len) and torch.equal(row.expand_as(expected), expected)
    positions = torch.zeros(2, q_len, dtype=torch.long)
    assert RelativeBias(torch.randn(3, 7), 4, positions=positions).of_query(query, q_len, kv_len) is None
