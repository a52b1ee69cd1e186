"""The oracle against the definition: dropout, probabilities, half precision."""

import pytest
import torch

from attnzoo.backends.eager import EagerBackend, evaluate
from attnzoo.spec.bias import DenseBias
from attnzoo.spec.patterns import Causal, Full, Window
from attnzoo.spec.segments import Attention, Segment


def two_segments(dtype=torch.float64, kv_heads=2, **terms):
    query = torch.randn(2, 4, 6, 8, dtype=dtype)
    first, second = (torch.randn(2, kv_heads, length, 8, dtype=dtype) for length in (6, 5))
    hides = torch.tensor([[True] * 5, [False] * 3 + [True] * 2])
    segments = (Segment(first, first.flip(2), Causal()), Segment(second, second.flip(2), Full(), key_mask=hides))
    return Attention(query, segments, 0.4, **terms)


def expected_weights(whole):
    """Return the softmax weights over the keys of both segments, in plain operations on each head."""
    weights = torch.zeros(whole.batch, whole.heads, whole.q_len, 11, dtype=torch.float64)
    (first, second), group = whole.segments, whole.heads // whole.segments[0].key.shape[1]
    for b in range(whole.batch):
        for h in range(whole.heads):
            keys = torch.cat([first.key[b, h // group], second.key[b, h // group]]).double()
            scores = whole.query[b, h].double() @ keys.T * whole.scale
            for q in range(whole.q_len):
                sees = [k <= q for k in range(6)] + second.key_mask[b].tolist()
                weights[b, h, q, sees] = scores[q, sees].exp() / scores[q, sees].exp().sum()
    return weights


def test_probabilities_are_the_softmax_over_all_segments():
    query_mask = torch.arange(6).expand(2, -1) != 4
    whole = two_segments(query_mask=query_mask)
    expected = expected_weights(whole) * query_mask[:, None, :, None]
    result = EagerBackend().run(whole, probabilities=True)
    for got in (result.probabilities, result.dropped):
        assert [tuple(part.shape) for part in got] == [(2, 4, 6, 6), (2, 4, 6, 5)]
        torch.testing.assert_close(torch.cat(got, dim=-1), expected)
    values = torch.cat([segment.value.repeat_interleave(2, 1) for segment in whole.segments], dim=2)
    torch.testing.assert_close(result.output, expected @ values)
    assert EagerBackend().run(whole)[2:] == (None, None)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_weights_at_its_rate_and_scales_them(rate):
    query, key = torch.randn(20, 2, 30, 4), torch.randn(20, 2, 30, 4)
    segments = (Segment(key, key), Segment(key, key.flip(2), Window(2, 2)))
    result = EagerBackend().run(Attention(query, segments, 0.5, dropout=rate), probabilities=True)
    for before, after in zip(result.probabilities, result.dropped, strict=True):
        kept = after != 0
        torch.testing.assert_close(after[kept], (before / (1.0 - rate))[kept])
        share = 1.0 - float(kept[before != 0].float().mean())
        assert abs(share - rate) < 0.03, share
    torch.testing.assert_close(result.output, result.dropped[0] @ key + result.dropped[1] @ key.flip(2))


@pytest.mark.parametrize("number", [0, 1])
def test_probabilities_of_each_segment_get_the_gradient_of_the_output(number):
    """In models, users call ``retain_grad`` on the probabilities."""
    whole = two_segments()
    whole = whole.with_tensors(tuple(tensor.requires_grad_() for tensor in whole.tensors()))
    result = EagerBackend().run(whole, probabilities=True)
    cotangent = torch.randn_like(result.output)
    (got,) = torch.autograd.grad(result.output, result.probabilities[number], cotangent)
    value = whole.segments[number].value.repeat_interleave(2, 1)
    torch.testing.assert_close(got, cotangent @ value.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_softmax_of_half_precision_runs_in_float32(dtype):
    """The weights are the float32 softmax of the rounded scores, rounded once."""
    scores = torch.randn(1, 1, 4, 700).to(dtype)
    zeros = torch.zeros(1, 1, 4, 4, dtype=dtype), torch.zeros(1, 1, 700, 4, dtype=dtype)
    result = evaluate(Attention(zeros[0], (Segment(zeros[1], zeros[1], bias=DenseBias(scores)),), 1.0))
    (weights,) = result.probabilities
    assert torch.equal(weights, scores.float().softmax(-1).to(dtype))
    assert result.output.dtype == dtype
