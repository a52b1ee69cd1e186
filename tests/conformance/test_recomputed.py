"""The yardstick whose backward computes the scores again: exact in float64, and as wrong as kernels are in float32."""

from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo.backends.eager import evaluate
from attnzoo.conformance.attention_check import check_attention, detached, gradient_vector
from attnzoo.conformance.cases import MASKS, AttentionCase
from attnzoo.conformance.recomputed import RecomputedBackend, recomputed
from tests.verification.planted_faults import load, passage


def _both(attention, rows, dtype=torch.float64):
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
@pytest.mark.parametrize("some", [False, True])
def test_it_is_the_oracle_in_float64(case, some):
    attention = case.attention()
    rows = torch.arange(0, case.q_len, 2) if some else torch.arange(case.q_len)
    kept, again, gradient, other = _both(attention, rows)
    assert torch.allclose(kept, again, rtol=0, atol=1e-13)
    assert torch.allclose(gradient, other, rtol=0, atol=1e-12 * float(gradient.abs().max()))


def test_negative_and_zero_scales():
    for scale in (-0.5, 0.0):
        attention = replace(AttentionCase(torch.float64).attention(), scale=scale)
        *_, gradient, other = _both(attention, torch.arange(37))
        assert torch.allclose(gradient, other, rtol=0, atol=1e-12 * float(gradient.abs().max()))


def _attentions(family):
    seen, model = [], load(family)
    with attnzoo.patch(model, "sdpa") as handle:
        for site in handle.sites:
            site.observer = lambda site, attention, result, backend: seen.append(attention)
        model(**passage(family, 0, 256))
    return seen


@pytest.mark.parametrize("family", ["gpt_neox", "led"])
def test_it_is_as_wrong_as_the_kernel_where_plain_operations_are_not(family):
    """Trained weights make high scores and keys with much in common."""
    ratios = []
    for attention in _attentions(family):
        report = check_attention("site", attention, "sdpa", grad=True)
        (gradient,) = [check for check in report.checks if check.what == "gradient"]
        ratios.append((gradient.error / gradient.eager_error, gradient.error / gradient.recomputed_error))
    assert max(kept for kept, _ in ratios) > 3.0, "more wrong than plain operations by more than k"
    assert max(again for _, again in ratios) < 2.5, "and no more wrong than plain operations that compute again"


def test_half_precision_is_computed_as_kernels_do():
    attention = AttentionCase(torch.bfloat16, attnzoo.Causal()).attention()
    rows = torch.arange(37)
    exact = evaluate(detached(attention, torch.float64, False), rows).output
    output = recomputed(attention, rows)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact.to(torch.bfloat16)) or (output - exact).abs().max() < 2**-8 * exact.abs().max()


def test_as_a_backend_it_refuses_what_it_does_not_compute():
    assert "recomputed" not in attnzoo.backends()
    request = replace(AttentionCase().attention().request(), dropout=True, probabilities=True)
    fields = {refusal.field for refusal in RecomputedBackend().refusals(request)}
    assert fields == {"dropout", "attention probabilities"}
