"""``verify`` condemns no right backend on trained weights, and misses none of the faults planted in one."""

import pytest
import torch

import attnzoo
from tests.checkpoints.train import RECIPES
from tests.verification.planted_faults import FAULTS, load, passage, ratios, without_the_term

families = pytest.mark.parametrize("family", RECIPES)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_far_over_budget(fault):
    report = fault.report()
    now, before = ratios(report)
    assert not report.ok and now > 50.0, str(report)
    assert before < 20.0 * now, "the term for scores computed again hides little of it"
    assert all(check.ok for check in report.original) and all(site.ok for site in report.original_sites)
    outputs = [check for site in report.sites for check in site.checks if check.what == "output"]
    assert all(check.ok for check in outputs) == fault.gradient_only


@families
@pytest.mark.parametrize(("backend", "passages"), [("sdpa", 3), ("eager", 1), ("native", 1)])
def test_what_is_right_is_within_the_rule(family, backend, passages):
    for number in range(passages):
        report = attnzoo.verify(load(family), passage(family, number, 256), backend)
        assert report.ok, str(report)


@families
def test_padding_is_judged_on_real_tokens(family):
    for backend in ("sdpa", "native"):
        report = attnzoo.verify(load(family), passage(family, padded=True), backend)
        assert report.ok, str(report)


@families
def test_budgets_are_those_of_roundings(family):
    report = attnzoo.verify(load(family), passage(family, 0, 256), "sdpa")
    checks = [check for site in (*report.sites, *report.original_sites) for check in site.checks]
    gradients = [check for check in checks if check.what == "gradient"]
    assert gradients and all(0.0 < check.recomputed_error < 1e-4 * check.scale for check in gradients)
    assert all(check.recomputed_error == 0.0 for check in checks if check.what == "output")
    assert all(check.budget < 4e-4 * check.scale for check in checks)


def test_one_projection_alone_is_judged_end_to_end():
    """Its gradient has little in it but what scores that are computed again leave there."""
    model = load("led")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("decoder.layers.0.self_attn.q_proj" in name)
    (check,) = [
        check
        for check in attnzoo.verify(model, passage("led", 0, 256), "sdpa").end_to_end
        if check.what == "gradient of all parameters"
    ]
    assert check.ok and check.recomputed_error > 3 * check.eager_error > 0.0
    assert without_the_term(check) > 0.5


def test_the_original_stands_beside_its_own_kernel():
    """GPT-NeoX calls the kernel that ``sdpa`` calls, bit for bit: neither is condemned."""
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
