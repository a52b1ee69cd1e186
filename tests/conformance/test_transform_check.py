"""``check_transform`` rejects candidates that are wrong under one transform of ``torch.func`` or for one tensor."""

from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.conformance.transform_check import CHECKED_TRANSFORMS, check_transform
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Segment
from attnzoo.spec.transforms import transforms_around
from tests.support.candidates import Candidate, of_bias, softer, with_fields, with_segment

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 2, 2, 5, 7, 4
FACTORS = {"grad": 3.0, "jvp": 3.0, "vmap": 2.0, "vmap of grad": 3.0}
detach = torch.Tensor.detach


def attention(dtype=torch.float32):
    """Two segments with every kind of mask, bias and trained tensor. Sample 1 sees no key."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    def flags(*shape):
        return torch.rand(shape, generator=random) < 0.7

    near, far, query_mask = flags(BATCH, KV_LEN), flags(BATCH, 3), flags(BATCH, Q_LEN)
    near[1], far[1], query_mask[1, 0] = False, False, True
    far[0] = torch.tensor([True, False, False])
    positions = torch.randint(0, KV_LEN, (BATCH, Q_LEN), generator=random)
    segments = (
        Segment(
            *(normal(BATCH, 1, KV_LEN, DIM) for _ in range(2)), Causal(), near, None,
            RelativeBias(normal(HEADS, 9), zero=4, positions=positions),
        ),
        Segment(
            *(normal(BATCH, HEADS, 3, DIM) for _ in range(2)), Full(), far, flags(BATCH, HEADS, Q_LEN, 3),
            DenseBias(normal(BATCH, 1, Q_LEN, 3)),
        ),
    )  # fmt: skip
    query, empty = (normal(BATCH, HEADS, Q_LEN, DIM) for _ in range(2))
    return Attention(query, segments, 0.5, 0.0, query_mask, empty)


class Transformed(Candidate):
    """A candidate that declares all transforms."""

    capabilities = EagerBackend.capabilities


def is_rejected(before, transform, whole=None):
    """Whether the judge rejects a backend that computes another attention, ``before(attention)``."""
    return not check_transform(attention() if whole is None else whole, Transformed(before), transform).ok


@pytest.mark.parametrize("transform", CHECKED_TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_right_candidate_passes_with_the_numbers_of_the_rule(transform, dtype):
    check = check_transform(attention(dtype), Transformed(), transform)
    assert check.ok and check.what == transform
    assert 0.0 < check.eager_error < 64 * torch.finfo(dtype).eps * check.scale
    budget = FACTORS[transform] * (check.eager_error + 4 * torch.finfo(dtype).eps * check.scale)
    assert check.budget == pytest.approx(budget)


@pytest.mark.parametrize("transform", CHECKED_TRANSFORMS)
def test_wrong_scale_is_rejected(transform):
    assert is_rejected(softer, transform)


@pytest.mark.parametrize("transform", CHECKED_TRANSFORMS)
def test_candidate_that_is_wrong_under_one_transform_only_is_rejected_there(transform):
    def before(part):
        names = " of ".join(transforms_around(part.tensors()))
        return softer(part) if names == transform else part

    assert [other for other in CHECKED_TRANSFORMS if is_rejected(before, other)] == [transform]


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_result_in_another_dtype_is_rejected(transform):
    wider = Transformed(after=lambda output, part: output.double())
    check = check_transform(attention(), wider, transform)
    assert not check.ok and "got torch.float64; allowed: torch.float32" in str(check)


# A tensor that requires grad, and a function that drops its gradient and its tangent.
WITHOUT_GRADIENT = {
    "query": with_fields(query=detach),
    "empty": with_fields(empty=detach),
    "key": with_segment(0, key=detach),
    "value": with_segment(0, value=detach),
    "relative bias": with_segment(0, bias=of_bias(detach)),
    "key of the second segment": with_segment(1, key=detach),
    "value of the second segment": with_segment(1, value=detach),
    "dense bias of the second segment": with_segment(1, bias=of_bias(detach)),
}


@pytest.mark.parametrize("before", WITHOUT_GRADIENT.values(), ids=WITHOUT_GRADIENT)
def test_missing_gradient_of_one_tensor_is_rejected(before):
    assert [kind for kind in CHECKED_TRANSFORMS if is_rejected(before, kind)] == ["grad", "jvp", "vmap of grad"]


def test_tensors_that_do_not_require_grad_have_no_gradient():
    whole = attention()
    frozen = whole.with_tensors((whole.query, *(tensor.detach() for tensor in whole.tensors()[1:])))
    for before in (with_segment(0, key=detach), with_segment(1, bias=of_bias(detach))):
        assert not is_rejected(before, "grad", frozen) and not is_rejected(before, "jvp", frozen)
    assert is_rejected(with_fields(query=detach), "grad", frozen)


FIRST = attention()


def of_the_first(index, field):
    """Return a function that uses one field of the first attention for both attentions."""
    return with_segment(index, **{field: lambda own: getattr(FIRST.segments[index], field)})


OF_THE_FIRST = {
    "query": with_fields(query=lambda query: FIRST.query),
    "query mask": with_fields(query_mask=lambda mask: FIRST.query_mask),
    "empty": with_fields(empty=lambda empty: FIRST.empty),
    "key": of_the_first(0, "key"),
    "value": of_the_first(0, "value"),
    "key mask": of_the_first(0, "key_mask"),
    "bias": of_the_first(0, "bias"),
    "positions of the bias": with_segment(
        0, bias=lambda bias: replace(bias, positions=FIRST.segments[0].bias.positions)
    ),
    "key of the second segment": of_the_first(1, "key"),
    "key mask of the second segment": of_the_first(1, "key_mask"),
    "mask of the second segment": of_the_first(1, "mask"),
}


@pytest.mark.parametrize("transform", ["vmap", "vmap of grad"])
@pytest.mark.parametrize("before", OF_THE_FIRST.values(), ids=OF_THE_FIRST)
def test_tensor_of_the_first_attention_used_for_both_is_rejected(before, transform):
    assert is_rejected(before, transform)


def test_equal_seeds_give_equal_cotangents_and_tangents():
    for transform in ("grad", "jvp", "vmap of grad"):
        checks = [check_transform(attention(), Transformed(), transform, seed=seed) for seed in (0, 0, 1)]
        assert checks[0] == checks[1] and checks[0].scale != checks[2].scale


def test_candidate_that_refuses_the_transform_raises():
    with pytest.raises(attnzoo.BackendRefusedError, match="vmap"):
        check_transform(attention(), Candidate(), "vmap")
