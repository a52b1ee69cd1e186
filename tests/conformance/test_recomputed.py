"""``recomputed`` is exact in float64, and its gradients are as wrong in float32 as those of kernels."""

from dataclasses import dataclass, replace

import pytest
import torch

import attnzoo
from attnzoo.backends.eager import EagerBackend, evaluate
from attnzoo.conformance import attention_check
from attnzoo.conformance.attention_check import check_attention, detached, gradient_vector
from attnzoo.conformance.cases import MASKS, AttentionCase
from attnzoo.conformance.recomputed import RecomputedBackend, recomputed
from attnzoo.spec.segments import Attention, Segment
from tests.support.checkpoints import load, passage


def _both(attention, rows, dtype=torch.float64):
    """Outputs and gradients of eager and of recomputed."""
    kept, again = (detached(attention, dtype, True) for _ in range(2))
    outputs = evaluate(kept, rows).output, recomputed(again, rows)
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (*outputs, gradient_vector(outputs[0], kept, weights), gradient_vector(outputs[1], again, weights))


CASES = [
    *(AttentionCase(torch.float64, mask=mask, kv_heads=2) for mask in MASKS),
    *(
        AttentionCase(torch.float64, attnzoo.Window(5, 3), mask=mask, bias="trained relative")
        for mask in ("none", "keys")
    ),
    AttentionCase(torch.float64, attnzoo.Causal(), bias="trained dense", kv_heads=1, uneven=True),
    AttentionCase(torch.float64, attnzoo.spec.patterns.SortedChunks(8, 1, 0, causal=True), mask="keys"),
    AttentionCase(torch.float64, attnzoo.Causal(), mask="keys", q_len=1, kv_len=23),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("some_rows", [False, True])
def test_recomputed_equals_the_oracle_in_float64(case, some_rows):
    attention = case.attention()
    rows = torch.arange(0, case.q_len, 2) if some_rows else torch.arange(case.q_len)
    kept, again, gradient, other = _both(attention, rows)
    assert torch.allclose(kept, again, rtol=0, atol=1e-13)
    assert torch.allclose(gradient, other, rtol=0, atol=1e-12 * float(gradient.abs().max()))


def test_recomputed_supports_negative_and_zero_scales():
    for scale in (-0.5, 0.0):
        attention = replace(AttentionCase(torch.float64).attention(), scale=scale)
        *_, gradient, other = _both(attention, torch.arange(37))
        assert torch.allclose(gradient, other, rtol=0, atol=1e-12 * float(gradient.abs().max()))


def _attentions(family):
    observed, model = [], load(family)
    with attnzoo.patch(model, "sdpa") as handle:
        for site in handle.sites:
            site.observer = lambda site, attention, result, backend: observed.append(attention)
        model(**passage(family, 0, 256))
    return observed


@pytest.mark.parametrize("family", ["gpt_neox", "led"])
def test_recomputed_is_as_wrong_as_the_kernel_and_eager_is_not(family):
    """Trained weights give large scores and a large mean key, and so large errors of scores computed again."""
    ratios = []
    for attention in _attentions(family):
        report = check_attention("site", attention, "sdpa", grad=True)
        (gradient,) = [check for check in report.checks if check.what == "gradient"]
        ratios.append((gradient.error / gradient.eager_error, gradient.error / gradient.recomputed_error))
    assert max(kept for kept, _ in ratios) > 3.0, "the kernel exceeds k times the error of eager"
    assert max(again for _, again in ratios) < 2.5, "but not k times the error of recomputed"


def test_recomputed_uses_float32_scores_in_half_precision():
    attention = AttentionCase(torch.bfloat16, attnzoo.Causal()).attention()
    rows = torch.arange(37)
    exact = evaluate(detached(attention, torch.float64, False), rows).output
    output = recomputed(attention, rows)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact.to(torch.bfloat16)) or (output - exact).abs().max() < 2**-8 * exact.abs().max()


def test_recomputed_backend_refuses_dropout_and_probabilities():
    assert "recomputed" not in attnzoo.backends()
    request = replace(AttentionCase().attention().request(), dropout=True, probabilities=True)
    fields = {refusal.field for refusal in RecomputedBackend().refusals(request)}
    assert fields == {"dropout", "attention probabilities"}


def test_checks_of_an_attention_repeat_and_draw_no_numbers_of_the_user():
    """The cotangent, the sampled rows and the summation orders come from generators with the seed of the check."""
    attention = AttentionCase(pattern=attnzoo.Causal()).attention()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = check_attention("site", attention, "eager", grad=True, max_rows=9)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert check_attention("site", attention, "eager", grad=True, max_rows=9).checks == first.checks
    other = check_attention("site", attention, "eager", grad=True, max_rows=9, seed=1)
    assert other.checks[1].scale != first.checks[1].scale


@dataclass(frozen=True)
class OtherScale(EagerBackend):
    """A backend whose gradients fail in every order of summation."""

    def run(self, attention, probabilities=False):
        return EagerBackend().run(replace(attention, scale=2 * attention.scale), probabilities)


@pytest.mark.parametrize(("rows", "orders"), [(1, 8), (32, 8), (64, 4), (200, 1), (600, 1)])
def test_the_fewer_the_rows_the_more_summation_orders_are_tried(monkeypatch, rows, orders):
    """The errors of few rows may all be small by chance. With many rows, each order takes long.

    If the first order passes, no other order can change the result.
    """
    tried = []

    def noted(part, chosen, order):
        tried.append(order)
        return recomputed(part, chosen, order=order)

    monkeypatch.setattr(attention_check, "recomputed", noted)
    query, key = torch.randn(1, 1, rows, 4), torch.randn(1, 1, 3, 4)
    whole = Attention(query, (Segment(key, key),), 0.5)
    assert check_attention("site", whole, "eager", grad=True, max_rows=1000).ok and tried == [0]
    tried.clear()
    assert not check_attention("site", whole, OtherScale(), grad=True, max_rows=1000).ok
    assert tried == list(range(orders))
