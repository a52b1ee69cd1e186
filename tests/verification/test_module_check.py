"""``verify`` checks the model's own code, module by module, by the error rule."""

import pytest
import torch

import attnzoo
from tests.support.models import gpt_neox, ids

FACTORS = {"output": 2.0, "gradient": 3.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_budgets_of_the_models_own_code_have_the_numbers_of_the_rule(dtype):
    report = attnzoo.verify(gpt_neox(num_hidden_layers=1).to(dtype), {"input_ids": ids(2, 21)}, "native")
    (site,) = report.original_sites
    assert [check.what for check in site.checks] == list(FACTORS)
    for check in site.checks:
        plain = max(check.eager_error, check.recomputed_error)
        budget = FACTORS[check.what] * (plain + 4 * torch.finfo(dtype).eps * check.scale)
        assert check.budget == pytest.approx(budget)
        assert (check.recomputed_error > 0) == (check.what == "gradient")


@pytest.mark.parametrize(
    ("options", "compared"),
    [
        ({}, ["logits", "logits (gradients enabled)", "gradient of all parameters"]),
        (dict(gradients=False), ["logits"]),
        (dict(fast=True), ["logits"]),
    ],
    ids=str,
)
def test_model_and_original_are_compared_on_the_same_results(options, compared):
    """With ``fast``, the gradients of the whole model are not compared."""
    report = attnzoo.verify(gpt_neox(num_hidden_layers=1), {"input_ids": ids(2, 21)}, "sdpa", **options)
    assert [check.what for check in report.end_to_end] == compared
    assert [check.what for check in report.original] == compared
