"""The error rule: its numbers by value, and values that never pass."""

import math

import pytest
import torch

from attnzoo.conformance import error_rule
from attnzoo.conformance.error_rule import Check, check, largest_difference

# Written out, not read from torch.finfo: the budget of a dtype must not follow the dtype of a tensor.
EPS = {
    torch.float64: 2.220446049250313e-16,
    torch.float32: 1.1920928955078125e-07,
    torch.bfloat16: 0.0078125,
    torch.float16: 0.0009765625,
}
K = {"output": 2.0, "gradient": 3.0}
SCALE = 8.0  # the largest absolute value of the reference
PLAIN_ERROR = {torch.float64: 2.0**-12, torch.float32: 2.0**-12, torch.bfloat16: 0.25, torch.float16: 0.125}


def reference():
    return torch.tensor([1.0, -SCALE, 0.0, 2.0], dtype=torch.float64)


def moved(by, index=2):
    """The reference in float64 with one value that is wrong by ``by``."""
    result = reference()
    result[index] += by
    return result


def budget_of(what, dtype):
    """Return the budget of the error rule, from the numbers above."""
    # Plain operations for float64 run in float32. Their error is scaled by 2**-52 / 2**-23.
    plain = PLAIN_ERROR[dtype] * (2.0**-29 if dtype == torch.float64 else 1.0)
    return K[what] * (plain + 4 * EPS[dtype] * SCALE)


def judged(what, dtype, error, plain_error=None, recomputed=()):
    """Return the verdict on a result with one wrong value. Plain operations also have one wrong value."""
    plain_error = PLAIN_ERROR[dtype] if plain_error is None else plain_error
    plain, k = moved(plain_error, 3), error_rule.factor(what)
    return check(
        what, moved(error), reference(), plain, k, dtype, error_rule.plain_dtype(dtype), [moved(e) for e in recomputed]
    )


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("what", K)
def test_result_at_the_budget_passes_and_beyond_it_fails(what, dtype):
    budget = budget_of(what, dtype)
    assert judged(what, dtype, 0.0).budget == pytest.approx(budget, rel=1e-12)
    for sign in (1.0, -1.0):
        assert judged(what, dtype, 0.99 * sign * budget).ok
        assert not judged(what, dtype, 1.01 * sign * budget).ok


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("what", K)
def test_error_equal_to_the_budget_passes_and_one_ulp_more_fails(what, dtype):
    budget = judged(what, dtype, 0.0).budget
    assert judged(what, dtype, budget).ok  # the spoiled value of the reference is 0, so the error is exact
    assert not judged(what, dtype, math.nextafter(budget, math.inf)).ok


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_budget_without_plain_error_is_four_roundings_of_the_largest_value(dtype):
    for what, k in K.items():
        assert judged(what, dtype, 0.0, plain_error=0.0).budget == pytest.approx(k * 4 * EPS[dtype] * SCALE, rel=1e-12)


def test_float64_candidate_that_computes_in_float32_fails():
    values = torch.linspace(0.1, 1.0, 50, dtype=torch.float64)
    single = values.float().double()
    verdict = check("output", single, values, single, 2.0, torch.float64, torch.float32)
    assert not verdict.ok and verdict.share > 1e6


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_plain_operations_run_in_the_dtype_and_in_float32_for_float64(dtype):
    assert error_rule.plain_dtype(dtype) == (torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("what", ["gradient", "gradient of the key"])
def test_only_names_that_begin_with_gradient_get_the_factor_of_gradients(what):
    assert error_rule.factor(what) == 3.0
    assert error_rule.factor("output") == error_rule.factor("logits") == error_rule.factor("no gradient") == 2.0


def test_budget_follows_the_dtype_asked_for_and_not_the_tensors():
    exact = reference()
    for stored in (torch.float32, torch.float64):
        got = exact.to(stored)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert check("output", got, exact, got, 2.0, dtype).budget == pytest.approx(8 * EPS[dtype] * SCALE)
        assert check("output", got, exact, got, 2.0).budget == pytest.approx(8 * EPS[stored] * SCALE)
    # Plain operations in float32 for a computation in bfloat16: their error counts by the ratio of the epsilons.
    plain = check("output", exact, exact, moved(2.0**-12), 2.0, torch.bfloat16, torch.float32)
    assert plain.eager_error == pytest.approx(2.0**-12 * 65536)
    assert plain.budget == pytest.approx(2.0 * (2.0**-12 * 65536 + 4 * 0.0078125 * SCALE))


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_budget_of_gradients_uses_the_larger_plain_error(dtype):
    ratio = 2.0**-29 if dtype == torch.float64 else 1.0

    def budget(plain_error, *recomputed):
        return judged("gradient", dtype, 0.0, plain_error, recomputed).budget

    def of(error):
        return pytest.approx(3.0 * (error * ratio + 4 * EPS[dtype] * SCALE), rel=1e-12)

    assert budget(0.5) == of(0.5)
    assert budget(0.5, 0.25) == of(0.5)
    assert budget(0.25, 0.5) == budget(0.25, 0.5, 0.125) == budget(0.25, 0.125, -0.5) == of(0.5)
    verdict = judged("gradient", dtype, 0.0, 0.25, (0.125, -0.5))
    assert (verdict.eager_error, verdict.recomputed_error) == (0.25 * ratio, 0.5 * ratio)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_never_pass(bad, dtype):
    exact, spoiled = reference(), moved(bad)
    for values in ((spoiled, exact, exact), (exact, spoiled, exact), (exact, exact, spoiled), (spoiled,) * 3):
        assert not check("gradient", *values, 3.0, dtype, error_rule.plain_dtype(dtype)).ok
    assert check("gradient", spoiled, exact, exact, 3.0, dtype).share == math.inf
    for others in ([spoiled], [exact, spoiled], [spoiled, exact]):
        assert not check("gradient", exact, exact, exact, 3.0, dtype, recomputed=others).ok


@pytest.mark.parametrize("shape", [(3,), (5,), (1, 4), (4, 1), (), (0,)])
def test_result_of_another_shape_never_passes(shape):
    got = torch.zeros(shape, dtype=torch.float64)
    exact = torch.zeros(4, dtype=torch.float64)
    assert check("output", got, exact, exact, 2.0).error == math.inf
    assert not check("output", got, exact, exact, 2.0).ok
    assert not check("output", exact, exact, got, 2.0).ok
    assert not check("gradient", exact, exact, exact, 3.0, recomputed=[exact, got]).ok


def test_empty_results_pass_and_do_not_match_other_empty_shapes():
    empty = torch.zeros(2, 0)
    verdict = check("output", empty, empty.double(), empty, 2.0)
    assert (verdict.ok, verdict.error, verdict.budget, verdict.share) == (True, 0.0, 0.0, 0.0)
    assert not check("output", torch.zeros(0, 2), empty.double(), empty, 2.0).ok


def test_reference_of_zeros_allows_only_the_plain_error():
    zeros = torch.zeros(3, dtype=torch.float64)
    exact = check("output", zeros.float(), zeros, zeros.float(), 2.0)
    assert exact.ok and exact.budget == 0.0
    off = zeros.float()
    off[1] = 1e-30
    assert not check("output", off, zeros, zeros.float(), 2.0).ok
    assert check("output", off, zeros, zeros.float(), 2.0).share == math.inf
    assert check("output", off, zeros, off, 2.0).ok


def test_scale_is_the_largest_absolute_value_of_the_reference():
    assert judged("output", torch.float32, 0.0).scale == SCALE  # the largest value is negative


LONG = (1 << 17) + 1  # one element more than `largest_difference` compares at once


@pytest.mark.parametrize("index", [0, (1 << 17) - 1, 1 << 17, 2 * LONG - 1])
@pytest.mark.parametrize("wrong", [0.5, -0.5, math.nan, math.inf])
def test_one_wrong_element_of_a_long_result_counts_in_any_piece(index, wrong):
    exact, got = torch.zeros(2, LONG, dtype=torch.float64), torch.zeros(2, LONG)
    got.view(-1)[index] = wrong
    assert largest_difference(got, exact) == (0.5 if math.isfinite(wrong) else math.inf)
    assert largest_difference(got.T, exact.T) == largest_difference(got, exact)  # not contiguous


def test_verdict_depends_on_error_and_budget_only():
    def verdict(error, budget):
        return Check("output", error, 0.0, 1.0, budget)

    assert verdict(1.0, 1.0).ok and verdict(0.0, 0.0).ok
    assert not verdict(1.0, 0.5).ok and not verdict(math.inf, 1.0).ok and not verdict(math.nan, 1.0).ok
    assert not verdict(0.0, math.nan).ok and not verdict(0.0, math.inf).ok and not verdict(math.inf, math.inf).ok
    assert (verdict(1.0, 2.0).share, verdict(0.0, 0.0).share, verdict(1.0, 0.0).share) == (0.5, 0.0, math.inf)
    assert "FAILS" in str(verdict(1.0, 0.5)) and str(verdict(0.5, 1.0)).endswith("ok")
