"""The error rule: its numbers, and values that never pass."""

import pytest
import torch

from attnzoo.conformance import error_rule


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_pass(bad):
    values = torch.ones(3, dtype=torch.float64)
    spoiled = values.clone()
    spoiled[1] = bad
    assert error_rule.check("output", values, values, values, error_rule.FORWARD).ok
    assert not error_rule.check("output", spoiled, values, values, error_rule.FORWARD).ok
    assert not error_rule.check("output", values, spoiled, values, error_rule.FORWARD).ok
    assert not error_rule.check("output", values, values, spoiled, error_rule.FORWARD).ok


def test_error_rule_has_the_numbers_of_the_contract():
    reference = torch.tensor([4.0, -1.0], dtype=torch.float64)
    eager = reference.float() + torch.tensor([0.01, 0.0])
    budget = 2 * (0.01 + 4 * torch.finfo(torch.float32).eps * 4.0)
    just, over = reference.float(), reference.float()
    just[1] += 0.99 * budget
    over[1] += 1.01 * budget
    check = error_rule.check("output", just, reference, eager, error_rule.FORWARD)
    assert check.budget == pytest.approx(budget, rel=1e-4) and check.ok
    assert not error_rule.check("output", over, reference, eager, error_rule.FORWARD).ok
    assert error_rule.check("gradient", over, reference, eager, error_rule.GRADIENT).ok


def test_budget_of_gradients_uses_the_larger_plain_error():
    reference = torch.tensor([4.0, -1.0], dtype=torch.float64)
    eager, *others = (reference.float() + torch.tensor([off, 0.0]) for off in (0.01, 0.02, 0.05))
    few = 4 * torch.finfo(torch.float32).eps * 4.0

    def budget(*recomputed):
        return error_rule.check("gradient", eager, reference, eager, error_rule.GRADIENT, recomputed=recomputed).budget

    assert budget() == pytest.approx(3 * (0.01 + few), rel=1e-4)
    assert budget(others[0]) == pytest.approx(3 * (0.02 + few), rel=1e-4)
    assert budget(*others) == pytest.approx(3 * (0.05 + few), rel=1e-4)
    assert budget(reference.float()) == budget()
    assert not error_rule.check(
        "gradient", eager, reference, eager, error_rule.GRADIENT, recomputed=[eager * float("nan")]
    ).ok


def test_largest_difference_covers_every_piece_of_a_long_tensor(monkeypatch):
    monkeypatch.setattr(error_rule, "_ELEMENTS_AT_ONCE", 8)
    reference = torch.zeros(5, 7, dtype=torch.float64)
    for place in ((0, 0), (2, 3), (4, 6)):
        got = torch.zeros(5, 7)
        got[place] = -0.5
        assert error_rule.largest_difference(got, reference) == 0.5
        got[place] = float("nan")
        assert error_rule.largest_difference(got, reference) == float("inf")
