"""``check_attention`` rejects candidates that are wrong in one place, and accepts right candidates in every dtype."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import attnzoo
from attnzoo.backends.eager import evaluate
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.conformance.recomputed import RecomputedBackend, recomputed
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.segments import FLOATS, Attention, Segment
from tests.plugin.attnzoo_example_plugin.tiled import TiledBackend
from tests.support.candidates import (
    Candidate,
    candidate,
    changes_in_place,
    computed_in,
    gradient_at,
    normalised_last,
    of_bias,
    scaled_at,
    with_fields,
    with_permuted_components,
    with_scale_in,
    with_segment,
)
from tests.verification.planted_faults import scale_gradient

Q_LEN = 150  # more than the 128 rows that are compared by default
PADDING = 20  # rows of padding queries at the end of sample 1


def rich_attention(dtype=torch.float32, q_len=Q_LEN, first_keys=120):
    """Two samples, two segments with different biases and masks, GQA, padding queries, and rows that see no key."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape, grad=True):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_(grad)

    near = torch.ones(2, first_keys, dtype=torch.bool)
    near[0, :30], near[1, -9:] = False, False
    far = torch.tensor([[True, True, False, True, True], [False] * 5])  # sample 1 sees no key of the second segment
    query_mask = torch.ones(2, q_len, dtype=torch.bool)
    query_mask[1, -PADDING:] = False
    relative = RelativeBias(normal(4, 9), zero=4)
    segments = (
        Segment(normal(2, 2, first_keys, 8), normal(2, 2, first_keys, 8), attnzoo.Window(6, 3), near, None, relative),
        Segment(normal(2, 2, 5, 8), normal(2, 2, 5, 8), attnzoo.Full(), far, None, DenseBias(normal(1, 4, q_len, 5))),
    )
    return Attention(normal(2, 4, q_len, 8), segments, 8**-0.5, 0.0, query_mask, normal(2, 4, q_len, 8))


def verdicts(backend, dtype=torch.float32, **settings):
    report = check_attention("site", rich_attention(dtype), backend, **{"grad": True, **settings})
    assert report.ok == all(check.ok for check in report.checks)
    return {check.what: check.ok for check in report.checks}


def everything_wrong_at(place):
    return Candidate(after=scaled_at(place))


def seen_in_sample_0(key_mask):
    return key_mask.index_put((torch.tensor(0), torch.tensor(2)), torch.tensor(True))


GRADIENT_ONLY = {
    "query": with_fields(query=gradient_at()),
    "last row of the query": with_fields(query=gradient_at((0, slice(None), -1))),
    "one head of the query": with_fields(query=gradient_at((slice(None), 2))),
    "first key": with_segment(0, key=gradient_at()),
    "first value, one sample": with_segment(0, value=gradient_at(1)),
    "second key": with_segment(1, key=gradient_at()),
    "second value": with_segment(1, value=gradient_at()),
    "relative bias": with_segment(0, bias=of_bias(gradient_at())),
    "relative bias, one distance": with_segment(0, bias=of_bias(gradient_at((0, 4)))),
    "relative bias, clamped distances": with_segment(0, bias=of_bias(gradient_at((..., 0)))),
    "dense bias": with_segment(1, bias=of_bias(gradient_at())),
    "dense bias, missing": with_segment(1, bias=of_bias(torch.Tensor.detach)),
    "relative bias, missing": with_segment(0, bias=of_bias(torch.Tensor.detach)),
    "empty": with_fields(empty=gradient_at()),
    "empty, missing": with_fields(empty=torch.Tensor.detach),
}


@pytest.mark.parametrize("before", GRADIENT_ONLY.values(), ids=GRADIENT_ONLY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_candidate_with_one_wrong_gradient_is_rejected(before, dtype):
    assert verdicts(Candidate(before), dtype) == {"output": True, "gradient": False}
    assert verdicts(Candidate(before), dtype, grad=False) == {"output": True}


def gradient_through_padding(attention):
    """The forward is right. The backward adds the gradients of padding queries."""
    unmasked = evaluate(replace(attention, query_mask=None)).output
    return unmasked - unmasked.detach() + evaluate(attention).output.detach()


class _OfWrongOutput(torch.autograd.Function):
    """A right output with the gradient of a wrong output, as if the backward used other softmax weights."""

    @staticmethod
    def forward(ctx, right, wrong):
        return right.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def gradient_of_another_softmax(attention):
    other = evaluate(replace(attention, scale=attention.scale * 1.01)).output
    return _OfWrongOutput.apply(evaluate(attention).output.detach(), other)


def half_detached(attention):
    output = evaluate(attention).output
    return output.detach() + 0.99 * (output - output.detach())


BACKWARDS = {
    "flows through padding queries": gradient_through_padding,
    "uses another softmax": gradient_of_another_softmax,
    "is scaled": half_detached,
    "is missing": lambda attention: evaluate(attention).output.detach(),
    "is NaN": lambda attention: scale_gradient(evaluate(attention).output, float("nan")),
}


@pytest.mark.parametrize("compute", BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_candidate_with_a_wrong_backward_is_rejected(compute, dtype):
    assert verdicts(candidate(compute), dtype) == {"output": True, "gradient": False}


def put(place, value):
    def after(output, attention):
        output = output.clone()
        output[place] = value
        return output

    return Candidate(after=after)


_all = slice(None)
OUTPUTS = {
    "the first row": everything_wrong_at((_all, _all, 0)),
    "the last row": everything_wrong_at((_all, _all, -1)),
    "the last row of one head in one sample": everything_wrong_at((0, 3, -1)),
    "a middle block of rows": everything_wrong_at((0, 1, slice(60, 90))),
    "one head": everything_wrong_at((_all, 2)),
    "one sample": everything_wrong_at(1),
    "one component": everything_wrong_at((..., 5)),
    "padding queries are not zero": put((1, 2, -PADDING), 0.25),
    "the last padding query is NaN": put((1, 2, -1, 0), float("nan")),
    "padding queries are computed": Candidate(with_fields(query_mask=lambda mask: None)),
    "queries without keys get zero": Candidate(with_fields(empty=lambda empty: None)),
    "one padding key is visible in one sample": Candidate(with_segment(0, key_mask=seen_in_sample_0)),
    "mask of the second segment is ignored": Candidate(with_segment(1, key_mask=lambda mask: None)),
    "masks of the samples are swapped": Candidate(with_segment(1, key_mask=lambda mask: mask.flip(0))),
    "window is too short by one": Candidate(with_segment(0, pattern=lambda p: replace(p, left=p.left - 1))),
    "bias is shifted by one": Candidate(with_segment(0, bias=lambda bias: replace(bias, zero=bias.zero - 1))),
    "bias starts at the first key": Candidate(with_segment(0, bias=lambda bias: replace(bias, offset=0))),
    "bias of the second segment is ignored": Candidate(with_segment(1, bias=lambda bias: None)),
    "scale is slightly off": Candidate(with_fields(scale=lambda scale: scale * 1.0005)),
    "second value is slightly off": Candidate(with_segment(1, value=lambda value: value * 1.0005)),
    "key heads are interleaved": Candidate(
        with_segment(0, key=lambda key: key.repeat(1, 2, 1, 1), value=lambda value: value.repeat(1, 2, 1, 1))
    ),
}


@pytest.mark.parametrize("backend", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_candidate_with_one_wrong_place_in_the_output_is_rejected(backend, grad):
    assert not verdicts(backend, grad=grad)["output"]
    assert not verdicts(backend, torch.float64, grad=grad)["output"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", [what for what in OUTPUTS if "slightly" not in what])  # slightly: within roundings
def test_candidate_in_half_precision_is_rejected(what, dtype):
    assert not verdicts(OUTPUTS[what], dtype, grad=False)["output"]


def test_float64_candidate_that_computes_in_float32_is_rejected():
    assert verdicts(computed_in(torch.float32), torch.float64) == {"output": False, "gradient": False}
    assert verdicts(Candidate(after=scaled_at(..., 1 << 12)), torch.float64)["output"] is False
    assert verdicts(computed_in(torch.bfloat16), torch.float32)["output"] is False


def test_candidate_that_is_wrong_only_with_gradients_needs_a_check_with_gradients():
    def sharper(attention):
        return replace(attention, scale=attention.scale * (1.01 if torch.is_grad_enabled() else 1.0))

    assert verdicts(Candidate(sharper), grad=False) == {"output": True}
    assert verdicts(Candidate(sharper), grad=True) == {"output": False, "gradient": False}


def hides_before(attention):
    """Change a mask in place before the attention is computed. An oracle that runs later would agree."""
    attention.segments[0].key_mask[0, 40:] = False
    return attention


INPUTS = {
    "query": lambda a: a.query,
    "key of the first segment": lambda a: a.segments[0].key,
    "value of the second segment": lambda a: a.segments[1].value,
    "relative bias": lambda a: a.segments[0].bias.values,
    "empty": lambda a: a.empty,
    "query mask": lambda a: a.query_mask,
    "key mask of the second segment": lambda a: a.segments[1].key_mask,
}


@pytest.mark.parametrize("choose", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidate_that_changes_its_inputs_is_rejected(choose, dtype):
    checks = verdicts(changes_in_place(choose), dtype, grad=False)
    assert checks == {"output": True, "inputs, which the backend must not change": False}


def test_oracle_does_not_see_masks_that_the_candidate_changed():
    checks = verdicts(Candidate(hides_before), grad=False)
    assert checks == {"output": False, "inputs, which the backend must not change": False}


def test_inputs_with_nan_count_as_unchanged():
    attention = rich_attention()
    with torch.no_grad():
        attention.query[0, 0, 3, 0] = float("nan")
    assert [check.what for check in check_attention("site", attention, "eager", grad=False).checks] == ["output"]


RIGHT = {
    "plain operations": Candidate(),
    "float64 inside": computed_in(torch.float64),
    "online softmax over blocks": TiledBackend(tile=16),
    "online softmax over blocks of one odd size": TiledBackend(tile=7),
    "scores computed again in the backward": RecomputedBackend(),
    "scores computed again in another order": candidate(partial(recomputed, order=5)),
    "division after the product with the values": candidate(normalised_last),
    "powers of two": candidate(partial(normalised_last, exponential=torch.exp2, factor=1.4426950408889634)),
    "components in another order": Candidate(with_permuted_components),
    "scale in the query": Candidate(with_scale_in(query=1.0, key=0.0)),
    "scale in the keys": Candidate(with_scale_in(query=0.0, key=1.0)),
    "segments in reverse order": Candidate(lambda a: replace(a, segments=a.segments[::-1])),
}


@pytest.mark.parametrize("backend", RIGHT.values(), ids=RIGHT)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_right_candidate_is_accepted(backend, dtype):
    assert verdicts(backend, dtype) == {"output": True, "gradient": True}
    assert verdicts(backend, dtype, max_rows=ALL_ROWS) == {"output": True, "gradient": True}
    assert verdicts(backend, dtype, max_rows=9, grad=False) == {"output": True}


@pytest.mark.parametrize("seed", range(6))
def test_first_and_last_row_are_compared_with_every_seed(seed):
    for row in (0, -1):
        wrong = everything_wrong_at((0, 0, row))
        assert not verdicts(wrong, max_rows=2, seed=seed, grad=False)["output"]
        assert not verdicts(wrong, max_rows=16, seed=seed, grad=False)["output"]


def test_rows_between_are_a_sample_that_depends_on_the_seed():
    wrong = everything_wrong_at((0, 0, 75))
    accepted = [verdicts(wrong, max_rows=76, seed=seed, grad=False)["output"] for seed in range(24)]
    assert accepted == [verdicts(wrong, max_rows=76, seed=seed, grad=False)["output"] for seed in range(24)]
    assert 4 <= sum(accepted) <= 20  # half of the rows are compared
    assert not verdicts(wrong, max_rows=Q_LEN, grad=False)["output"]
    assert verdicts(everything_wrong_at((0, 0, slice(1, -1))), max_rows=2, grad=False)["output"]
    assert not verdicts(everything_wrong_at((0, 0, slice(1, -1))), max_rows=3, grad=False)["output"]


def test_gradients_of_rows_that_are_not_sampled_are_zero():
    """With a sample of rows, a right candidate passes and a wrong sampled row fails."""
    last = with_fields(query=gradient_at((0, slice(None), -1)))
    assert verdicts(Candidate(last), max_rows=2) == {"output": True, "gradient": False}
    inner = with_fields(query=gradient_at((0, slice(None), slice(1, -1))))
    assert verdicts(Candidate(inner), max_rows=2) == {"output": True, "gradient": True}
    assert verdicts(Candidate(inner), max_rows=3) == {"output": True, "gradient": False}


@pytest.mark.parametrize("max_rows", [2, 9, 40])
def test_sampled_rows_use_their_part_of_the_query_mask(max_rows):
    wrong = put((1, 2, -1), 1e-3)
    assert not verdicts(wrong, max_rows=max_rows)["output"]
    for backend in (Candidate(), RecomputedBackend(), TiledBackend(tile=16)):
        assert verdicts(backend, max_rows=max_rows) == {"output": True, "gradient": True}


class _HidesKeysOfPadding(Candidate):
    """An approximate backend that hides all keys but one from padding queries, and changes nothing else."""

    def changes(self, request):
        return "padding queries see one key"

    def rewrite(self, attention, decisions=None):
        (segment,) = attention.segments
        first = torch.arange(segment.kv_len) == 0
        mask = attention.query_mask[:, None, :, None] | first
        return replace(attention, segments=(replace(segment, mask=mask),))


@pytest.mark.parametrize("max_rows", [12, 40, Q_LEN])
def test_recall_is_the_mean_over_sampled_rows_that_are_no_padding(max_rows):
    whole = rich_attention()
    query_mask = torch.arange(Q_LEN)[None] % torch.tensor([[2], [3]]) != 0
    whole = replace(whole, segments=(replace(whole.segments[1], key_mask=None),), query_mask=query_mask, empty=None)
    report = check_attention("site", whole, _HidesKeysOfPadding(), grad=False, max_rows=max_rows)
    assert report.recall == pytest.approx(1.0, abs=1e-12)
    everything = replace(whole, query_mask=None)
    assert check_attention("site", everything, "eager", grad=False, max_rows=max_rows).recall is None
