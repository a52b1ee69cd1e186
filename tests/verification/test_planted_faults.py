"""On trained weights, ``verify`` passes right backends and detects every planted fault."""

import pytest
import torch

import attnzoo
from tests.checkpoints.train import RECIPES
from tests.support.checkpoints import load, passage
from tests.verification.planted_faults import FAULTS, share_without_term, shares

families = pytest.mark.parametrize("family", RECIPES)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_planted_fault_exceeds_its_budget_by_far(fault):
    report = fault.report()
    with_term, without_term = shares(report)
    assert not report.ok and with_term > 50.0, str(report)
    assert without_term < 20.0 * with_term, "the term for scores computed again hides the fault"
    assert all(check.ok for check in report.original) and all(site.ok for site in report.original_sites)
    outputs = [check for site in report.sites for check in site.checks if check.what == "output"]
    assert all(check.ok for check in outputs) == fault.gradient_only


@families
@pytest.mark.parametrize(("backend", "passages"), [("sdpa", 2), ("eager", 1), ("native", 1)])
def test_right_backend_passes(family, backend, passages):
    for number in range(passages):
        report = attnzoo.verify(load(family), passage(family, number, 256), backend)
        assert report.ok, str(report)


@families
def test_padded_inputs_are_compared_on_real_tokens(family):
    for backend in ("sdpa", "native"):
        report = attnzoo.verify(load(family), passage(family, padded=True), backend)
        assert report.ok, str(report)


@families
def test_budgets_have_the_size_of_roundings(family):
    report = attnzoo.verify(load(family), passage(family, 0, 256), "sdpa")
    checks = [check for site in (*report.sites, *report.original_sites) for check in site.checks]
    gradients = [check for check in checks if check.what == "gradient"]
    assert gradients and all(0.0 < check.recomputed_error < 1e-4 * check.scale for check in gradients)
    assert all(check.recomputed_error == 0.0 for check in checks if check.what == "output")
    assert all(check.budget < 4e-4 * check.scale for check in checks)


def test_one_projection_alone_passes_end_to_end():
    """The gradient of the projection is small compared with the error from computing the scores again."""
    model = load("led")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("decoder.layers.0.self_attn.q_proj" in name)
    (check,) = [
        check
        for check in attnzoo.verify(model, passage("led", 0, 256), "sdpa").end_to_end
        if check.what == "gradient of all parameters"
    ]
    assert check.ok and check.recomputed_error > 3 * check.eager_error > 0.0
    assert share_without_term(check) > 0.5


def test_original_and_backend_with_the_same_kernel_have_the_same_errors():
    """GPT-NeoX calls the kernel that ``sdpa`` calls, with the same bits."""
    report = attnzoo.verify(load("gpt_neox"), passage("gpt_neox", 0, 256), "sdpa")
    assert [site.name for site in report.original_sites] == [site.name for site in report.sites]
    assert {site.kernel for site in report.original_sites} == {"native"}
    ours, theirs = report.end_to_end, report.original
    assert [(check.what, check.error) for check in ours] == [(check.what, check.error) for check in theirs]


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_models_own_code_is_a_baseline_in_other_dtypes(family, dtype):
    report = attnzoo.verify(load(family).to(dtype), passage(family), "native")
    assert report.ok, str(report)
