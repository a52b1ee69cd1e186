"""``lsh`` on dense attention. (``test_blocked_local.py`` tests that it is exact on local models.)"""

from bisect import bisect_left
from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo import testing
from attnzoo.backends.approximate.lsh import LshBackend
from attnzoo.backends.eager import evaluate
from attnzoo.conformance.attention_check import check_attention
from attnzoo.conformance.error_rule import FORWARD, check
from attnzoo.registry import registry
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Segment
from attnzoo.verification.oracles import oracles
from tests.support import models as zoo
from tests.support.approximate import KEYS, assert_refused, attention, key_mask, matches_definition
from tests.support.fake_backends import fake_backend
from tests.support.judge import chunked, in_one_forward

OPTIONS = dict(num_hashes=2, chunk_length=3, num_buckets=4, inner="sdpa")


def lsh(**changes):
    return LshBackend(**{**OPTIONS, **changes})


def definition(backend, whole):
    """Return the definition ``sees(b, h, q, k)``: the nearest direction by a search, the chunks by sorted lists."""
    (segment,) = whole.segments
    causal, first = isinstance(segment.pattern, Causal) or whole.q_len == 1, segment.kv_len - whole.q_len
    real = torch.ones(whole.batch, segment.kv_len, dtype=torch.bool) if segment.key_mask is None else segment.key_mask
    if whole.q_len == 1 and real.any():
        first = int(real.any(0).nonzero().max())
    rotations = torch.randn(
        (backend.num_hashes, whole.head_dim, backend.num_buckets // 2),
        generator=torch.Generator().manual_seed(backend.seed),
    )

    def bucket(number, vector):
        if backend.num_buckets == 1:
            return 0
        directions = torch.cat([rotations[number], -rotations[number]], dim=1).T
        return int((directions @ torch.nn.functional.normalize(vector.float(), dim=0)).argmax())

    def neighbours(number, b, h, q):
        keys = segment.key[b, h * segment.key.shape[1] // whole.heads]
        ordered = sorted((bucket(number, keys[k]), k) for k in range(segment.kv_len) if real[b, k])
        place = bisect_left(ordered, (bucket(number, whole.query[b, h, q]), first + q))
        chunk = max(0, min(place, len(ordered) - 1)) // backend.chunk_length
        start, stop = max(0, chunk - 1), chunk + (1 if causal else 2)
        return {k for _, k in ordered[start * backend.chunk_length : stop * backend.chunk_length]}

    known = {
        (b, h, q): set().union(*(neighbours(number, b, h, q) for number in range(backend.num_hashes)))
        for b in range(whole.batch)
        for h in range(whole.heads)
        for q in range(whole.q_len)
    }

    def sees(b, h, q, k):
        distance = first + q - k
        beside = 0 <= distance <= 1 if causal else abs(distance) <= 1
        return beside or (k in known[b, h, q] and (distance >= 0 or not causal))

    return sees


# Definition


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("pattern", [Causal(), Full()], ids=str)
@pytest.mark.parametrize("changes", [{}, dict(num_hashes=1, num_buckets=2), dict(chunk_length=5, seed=3)], ids=str)
def test_the_output_equals_the_definition(pattern, keys, changes):
    backend, whole = lsh(**changes), attention(pattern, key_mask(keys))
    assert matches_definition(backend, whole, definition(backend, whole))


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("pattern", [Causal(), Full()], ids=str)
def test_new_tokens_are_at_the_end_of_the_cache(pattern, q_len):
    whole = attention(pattern, key_mask(KEYS["left"]), q_len=q_len)
    assert matches_definition(lsh(), whole, definition(lsh(), whole))


@pytest.mark.parametrize("num_hashes", [1, 3])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("pattern", [Causal(), Full()], ids=str)
def test_one_bucket_and_long_chunks_are_full_attention(pattern, keys, num_hashes):
    backend, whole = lsh(num_buckets=1, chunk_length=13, num_hashes=num_hashes), attention(pattern, key_mask(keys))
    double = whole.with_tensors(tuple(tensor.double() for tensor in whole.tensors()))
    verdict = check("output", backend.run(whole).output, evaluate(double).output, evaluate(whole).output, FORWARD)
    assert verdict.ok, str(verdict)
    assert check_attention("site", whole, backend, grad=True).recall == pytest.approx(1.0)


@pytest.mark.parametrize("keys", ["no padding", "left"])
@pytest.mark.parametrize("room", [0, 5], ids=["dynamic", "static"])
def test_a_decoding_step_gives_the_last_row_of_one_forward(keys, room):
    whole = attention(Causal(), key_mask(KEYS[keys]), dtype=torch.float64)
    (segment,) = whole.segments
    expected = lsh().run(whole).output[:, :, -1:]
    real = torch.ones(2, 13, dtype=torch.bool) if segment.key_mask is None else segment.key_mask
    behind = torch.randn(2, 2, room, 8, dtype=torch.float64)
    longer = [torch.cat([tensor, behind], dim=2) for tensor in (segment.key, segment.value)]
    real = torch.cat([real, torch.zeros(2, room, dtype=torch.bool)], dim=1)
    step = Attention(whole.query[:, :, -1:], (Segment(*longer, key_mask=real),), whole.scale)
    torch.testing.assert_close(lsh().run(step).output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("keys", ["no padding", "left"])
def test_unused_cache_entries_fill_no_chunk(keys):
    """In a static cache, only the causal pattern hides the unused entries after the prompt."""
    whole = attention(Causal(), key_mask(KEYS[keys]), dtype=torch.float64)
    (segment,) = whole.segments
    behind = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    longer = [torch.cat([tensor, behind], dim=2) for tensor in (segment.key, segment.value)]
    real = segment.key_mask
    real = None if real is None else torch.cat([real, torch.ones(2, 7, dtype=torch.bool)], dim=1)
    roomy = replace(whole, segments=(Segment(*longer, Causal(0), key_mask=real),))
    torch.testing.assert_close(lsh().run(roomy).output, lsh().run(whole).output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_cases_of_the_kit_equal_the_oracle(dtype):
    backend = lsh(chunk_length=5, num_hashes=3)
    dense = [case for case in testing.cases((dtype,)) if isinstance(case.pattern, Full | Causal)]
    outcomes = [testing.run_case(backend, case) for case in dense]
    assert not [f"{outcome.case}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    assert {outcome.case.bias != "none" for outcome in outcomes if not outcome.refused} == {False}
    assert sum(not outcome.refused for outcome in outcomes) > 40


def test_check_site_detects_other_buckets_than_declared():
    class Lying(LshBackend):
        def run(self, attention, probabilities=False):
            return lsh(seed=self.seed + 1).run(attention)

    whole = attention(Causal(), None)
    assert not check_attention("site", whole, Lying(**OPTIONS), grad=False).ok
    assert check_attention("site", whole, lsh(), grad=False).ok


class ByDtype(LshBackend):
    """LSH whose buckets depend on the dtype. Rounding has this effect if two buckets are nearly equal."""

    def decisions(self, attention):
        return lsh(seed=self.seed + (attention.query.dtype == torch.float64)).decisions(attention)

    def rewrite(self, attention, decisions=None):
        return super().rewrite(attention, self.decisions(attention) if decisions is None else decisions)


def test_check_site_repeats_the_buckets_of_the_checked_dtype():
    whole = attention(Causal(), None)
    report = check_attention("site", whole, ByDtype(**OPTIONS), grad=True)
    assert report.ok and all(check.eager_error < 1e-5 * check.scale for check in report.checks), str(report)
    double = whole.with_tensors(tuple(tensor.double() for tensor in whole.tensors()))
    backend = ByDtype(**OPTIONS)
    outputs = [evaluate(backend.rewrite(double, backend.decisions(part))).output for part in (whole, double)]
    assert not torch.allclose(*outputs, atol=0.1), "other buckets are another attention"


# Recall


def clusters(count=8, each=16, dim=16):
    """Return an attention in which each query needs the keys of its cluster, which are spread over the sequence."""
    random = torch.Generator().manual_seed(5)
    centre = torch.nn.functional.normalize(torch.randn(count, dim, generator=random), dim=1)
    of = torch.randperm(count * each, generator=random) % count
    noise = torch.randn(2, 1, 1, count * each, dim, generator=random) * 0.05
    query, key = 3.0 * (centre[of] + noise)
    return Attention(query, (Segment(key, key, Full()),), 1.0)


def test_recall_is_high_on_clusters_and_rises_with_the_rounds():
    whole = clusters()
    options = dict(chunk_length=16, num_buckets=16)
    recalls = [check_attention("site", whole, lsh(**options, num_hashes=n), grad=False).recall for n in (1, 4)]
    blind = check_attention("site", whole, lsh(num_hashes=1, chunk_length=16, num_buckets=1), grad=False).recall
    assert blind < 0.5 < 0.8 < recalls[0] < 0.99 < recalls[1], (blind, recalls)


def test_recall_is_the_weight_of_the_visible_keys():
    whole = attention(Causal(), key_mask(KEYS["left"]), dtype=torch.float64)
    weights = evaluate(whole).probabilities[0]
    sees = definition(lsh(), whole)
    seen = torch.tensor(
        [[[[sees(b, h, q, k) for k in range(13)] for q in range(13)] for h in range(4)] for b in range(2)]
    )
    has_visible_key = weights.sum(-1) > 0
    expected = (weights * seen).sum(-1)[has_visible_key].mean()
    assert check_attention("site", whole, lsh(), grad=False).recall == pytest.approx(float(expected), abs=1e-9)


# Models


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify_repeats_the_buckets_of_the_checked_run(side, dtype):
    report = attnzoo.verify(zoo.gpt_neox().to(dtype), zoo.causal_inputs(26, side), "lsh", **OPTIONS)
    assert report.ok, str(report)
    assert report.changed == "2 hash rounds of 4 buckets, chunks of 3 keys"
    assert all(0.1 < site.recall < 1.0 for site in report.sites)


def test_verify_repeats_the_buckets_of_the_checked_dtype():
    report = attnzoo.verify(zoo.gpt_neox(), zoo.causal_inputs(26, "left"), ByDtype(**OPTIONS), gradients=False)
    assert report.ok and all(check.eager_error < 1e-3 * check.scale for check in report.end_to_end), str(report)


def test_the_oracle_repeats_the_buckets_of_another_run():
    whole, other = attention(Causal(), None), attention(Causal(), None, seed=1)
    oracle = oracles({"site": (lsh(), [lsh().decisions(whole)])})["site"]
    expected = evaluate(lsh().rewrite(other, lsh().decisions(whole))).output
    assert torch.equal(oracle.run(other).output, expected)
    assert not torch.allclose(expected, evaluate(lsh().rewrite(other)).output, atol=0.1)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_the_last_decoded_token_equals_one_forward(side, static):
    """This holds for one layer. In deeper models, new keys change the chunks, and so the states, of earlier tokens."""
    model, inputs = zoo.gpt_neox(num_hidden_layers=1), zoo.causal_inputs(24, side)
    with attnzoo.patch(model, "lsh", **OPTIONS) as handle:
        got, whole = chunked(model, inputs, (20, 1, 2, 1), static), in_one_forward(model, inputs)
    assert handle.sites[0].kernel == "flash_cpu"
    torch.testing.assert_close(got[:, -1], whole[:, -1], rtol=0, atol=2e-5 * float(whole.abs().max()))
    with torch.no_grad():
        assert (model(**inputs).logits - whole)[:, -1].abs().max() > 0.01 * whole.abs().max()


@pytest.mark.parametrize("side", ["none", "left"])
def test_generation_is_deterministic(side):
    model, prompt = zoo.gpt_neox(), zoo.causal_prompt(side)
    options = dict(max_new_tokens=8, do_sample=False)
    with attnzoo.patch(model, "lsh", **OPTIONS) as handle:
        first, second = (model.generate(**prompt, **options) for _ in range(2))
        static = model.generate(**prompt, **options, cache_implementation="static")
    assert torch.equal(first, second) and torch.equal(first, static)
    assert all(site.changed.total() == site.calls == 24 for site in handle.sites)


def test_rotations_depend_only_on_the_seed():
    whole = attention(Causal(), None)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = lsh().run(whole).output
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(lsh().run(whole).output, first)
    assert not torch.equal(lsh(seed=1).run(whole).output, first)


def test_training_reaches_every_parameter():
    model, inputs = zoo.gpt_neox().train(), zoo.causal_inputs(24, "left")
    with attnzoo.patch(model, "lsh", **OPTIONS):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


# Refusals


def test_dense_models_need_three_options():
    missing = dict(OPTIONS)
    for option in ("num_buckets", "num_hashes", "chunk_length"):
        missing.pop(option)
        words = ("gpt_neox.layers.1.attention", option, "num_hashes=..., chunk_length=..., num_buckets=...")
        assert_refused(lambda: attnzoo.patch(zoo.gpt_neox(), "lsh", **missing), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_hashes=0), ("num_hashes of backend 'lsh': got 0", "an integer >= 1")),
        (dict(chunk_length=0), ("chunk_length", "got 0")),
        (dict(chunk_length=2.0), ("chunk_length", "got 2.0")),
        (dict(num_buckets=0), ("num_buckets", "got 0")),
        (dict(num_buckets=7), ("num_buckets", "got 7", "1 or an even number")),
        (dict(seed=-1), ("seed", "got -1")),
        (dict(seed=1 << 63), ("seed", "2**63 - 1")),
        (dict(seed=None), ("seed", "got None")),
        (dict(num_hash=2), ("'num_hash'", "did you mean 'num_hashes'")),
    ],
)
def test_bad_options_name_the_argument(changes, words):
    assert_refused(lambda: attnzoo.patch(zoo.gpt_neox(), "lsh", **{**OPTIONS, **changes}), *words)


def test_a_bias_is_refused_unless_inner_supports_it():
    biased = attention(Causal(), None, bias=True)
    assert {reason.field for reason in lsh().refusals(biased.request())} == {"bias"}
    assert check_attention("site", biased, replace(lsh(), inner="eager"), grad=True).ok


def test_a_bias_needs_a_dense_backend_by_name():
    """``inner="auto"`` would select the oracle, with ``seq_len x seq_len`` scores."""
    auto, biased = lsh(inner="auto"), attention(Causal(), None, bias=True).request()
    assert all(supporting.dense for supporting in registry.supporting_backends(auto.rewrite_request(biased)))
    (refusal,) = auto.refusals(biased)
    assert (refusal.field, "a relative bias" in refusal.got) == ("bias", True)
    assert "no bias" in refusal.allowed and 'inner="eager"' in refusal.allowed
    assert not lsh(inner="eager").refusals(biased)
    assert not auto.refusals(attention(Causal(), None).request())


def test_a_bias_runs_on_a_backend_that_is_not_dense(request):
    able, whole = fake_backend("able", priority=1), attention(Causal(), None, bias=True)
    assert registry.refusals(lsh(inner="auto"), whole.request())
    attnzoo.register_backend(able)
    request.addfinalizer(lambda: attnzoo.unregister_backend("able"))
    assert not registry.refusals(lsh(inner="auto"), whole.request()), "registering a backend clears the cached refusals"
    lsh(inner="auto").run(whole)
    assert able.runs
