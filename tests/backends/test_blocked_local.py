"""``blocked-local``: a window and sinks instead of dense attention; local attention and cross-attention stay exact."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo import testing
from attnzoo.backends.approximate.blocked_local import BlockedLocalBackend
from attnzoo.conformance.attention_check import check_attention
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.patterns import Causal, Full, SortedChunks, Window
from tests.support import models as zoo
from tests.support.approximate import KEYS, assert_refused, attention, key_mask, matches_definition
from tests.support.judge import chunked, in_one_forward

SHAPES = [(2, 0), (4, 0), (3, 2), (5, 9), (2, 13), (3, 20), (40, 3)]


def local(window, sinks=0, inner="sdpa"):
    return BlockedLocalBackend(window=window, sinks=sinks, inner=inner)


def definition(whole, window, sinks):
    """Return the definition ``sees(b, h, q, k)``: the window by position, and the sinks by counting visible keys."""
    (segment,) = whole.segments
    real = torch.ones(whole.batch, segment.kv_len, dtype=torch.bool) if segment.key_mask is None else segment.key_mask
    if segment.mask is not None:
        real = real & segment.mask.expand(whole.batch, -1, -1, -1).any(1).any(1)
    causal = isinstance(segment.pattern, Causal)
    first = segment.pattern.offset if causal and segment.pattern.offset is not None else segment.kv_len - whole.q_len
    if whole.q_len == 1 and real.any():
        first = int(real.any(0).nonzero().max())
    shown = real[:, None, None].expand(-1, 4, whole.q_len, -1)
    if segment.mask is not None:
        shown = shown & segment.mask
    if causal:
        shown = shown & (torch.arange(segment.kv_len) <= first + torch.arange(whole.q_len)[:, None])
    number = (shown.cumsum(3) - 1).tolist()

    def sees(b, h, q, k):
        at = first + q
        near = at - k < window if causal else abs(at - k) < window
        return (near or number[b][h][q][k] < sinks) and (k <= at or not causal)

    return sees


# Definition


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize(("window", "sinks"), SHAPES)
@pytest.mark.parametrize("pattern", [Causal(), Causal(offset=0), Full()], ids=str)
def test_the_output_equals_the_definition(pattern, window, sinks, keys):
    whole = attention(pattern, key_mask(keys))
    assert matches_definition(local(window, sinks), whole, definition(whole, window, sinks))


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("pattern", [Causal(), Full()], ids=str)
def test_new_tokens_are_at_the_end_of_the_cache(pattern, q_len, keys):
    whole = attention(pattern, key_mask(keys), q_len=q_len)
    if keys is not None and q_len > 1 and isinstance(pattern, Full) and not key_mask(keys)[:, -1].any():
        return
    assert matches_definition(local(4, 2), whole, definition(whole, 4, 2))


@pytest.mark.parametrize("pattern", [Causal(), Full()], ids=str)
def test_a_single_token_is_at_the_last_visible_key(pattern):
    """A static cache has unused entries after the last visible key."""
    whole = attention(pattern, key_mask([(3, 8), (0, 8)]), q_len=1)
    assert matches_definition(local(3, 1), whole, lambda b, h, q, k: 5 <= k <= 7 or k == (3 if b == 0 else 0))


def test_unknown_query_positions_are_refused():
    spans = key_mask([(0, 8), (0, 9)])
    assert_refused(lambda: local(3).run(attention(Full(), spans, q_len=2)), "key_mask", "13 keys", "Causal(offset=...)")
    unknown = attention(Full(), spans, q_len=2)
    error = assert_refused(
        lambda: execute(local(3), unknown, place="layers.0.attention"), "  layers.0.attention:\n    key_mask"
    )
    assert set(error.refusals) == {"layers.0.attention"}
    whole = attention(Causal(offset=7), spans, q_len=2)
    assert matches_definition(local(3), whole, definition(whole, 3, 0))


@pytest.mark.parametrize("keys", ["no padding", "left"])
@pytest.mark.parametrize("pattern", [Causal(), Full()], ids=str)
def test_bias_and_dense_mask_are_kept(pattern, keys):
    mask = torch.rand(2, 1, 13, 13, generator=torch.Generator().manual_seed(3)) < 0.7
    by_head = mask ^ (torch.rand(1, 4, 13, 13, generator=torch.Generator().manual_seed(4)) < 0.2)
    for extra in (
        *(dict(bias=True), dict(mask=mask), dict(mask=mask[:1], kv_heads=1), dict(bias=True, mask=mask)),
        *(dict(mask=by_head), dict(mask=by_head[:1])),
    ):
        whole = attention(pattern, key_mask(KEYS[keys]), **extra)
        assert matches_definition(local(4, 3), whole, definition(whole, 4, 3))


@pytest.mark.parametrize("keys", ["no padding", "left"])
@pytest.mark.parametrize("pattern", [Causal(), Full()], ids=str)
def test_a_bias_of_each_sample_is_kept(pattern, keys):
    random = torch.Generator().manual_seed(5)
    values = torch.randn(2, 4, 13, 13, generator=random, dtype=torch.float64)
    positions = torch.randint(0, 13, (2, 13), generator=random)
    for bias in (DenseBias(values), DenseBias(values[:, :1]), RelativeBias(values[0, :, 0], 6, positions=positions)):
        whole = attention(pattern, key_mask(KEYS[keys]))
        whole = replace(whole, segments=(replace(whole.segments[0], bias=bias),))
        assert matches_definition(local(4, 3), whole, definition(whole, 4, 3))


@pytest.mark.parametrize("backend", [local(6), local(5, 3)], ids=["window", "window and sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_cases_of_the_kit_equal_the_oracle(backend, dtype):
    dense = [case for case in testing.cases((dtype,)) if isinstance(case.pattern, Full | Causal)]
    outcomes = [testing.run_case(backend, case) for case in dense[:: 1 if dtype == torch.float32 else 5]]
    assert not [f"{outcome.case}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    refused = {outcome.case for outcome in outcomes if outcome.refused and not outcome.case.transform}
    assert refused == {
        outcome.case
        for outcome in outcomes
        if (outcome.case.mask == "globals" or outcome.case.probabilities or outcome.case.softcap)
        and not outcome.case.transform
    }
    assert any(outcome.case.transform and not outcome.refused for outcome in outcomes)


@pytest.mark.parametrize("lie", ["nothing changed", "no sinks", "a wider window"])
def test_check_site_detects_another_pattern_than_declared(lie):
    class Lying(BlockedLocalBackend):
        def run(self, attention, probabilities=False):
            other = {"nothing changed": None, "no sinks": local(4), "a wider window": local(5, 2)}[lie]
            return registry.make_backend("eager").run(attention if other is None else other.rewrite(attention))

    report = check_attention("site", attention(Causal(), None), Lying(window=4, sinks=2), grad=False)
    assert not report.ok
    assert check_attention("site", attention(Causal(), None), local(4, 2), grad=False).ok


# Attention that is not rewritten


@pytest.mark.parametrize("pattern", [Window(2, 0), attnzoo.Chunks(4), Full(cross=True)], ids=str)
@pytest.mark.parametrize("backend", [BlockedLocalBackend(inner="sdpa"), local(3, 1)], ids=["no options", "options"])
def test_local_and_cross_attention_are_not_rewritten(pattern, backend):
    whole = attention(pattern, key_mask(KEYS["left"]))
    assert backend.rewrite(whole) is whole
    assert backend.changes(whole.request()) is None and not backend.refusals(whole.request())
    assert torch.equal(backend.run(whole).output, registry.make_backend("sdpa").run(whole).output)


@pytest.mark.parametrize(
    "case", [c for c in testing.cases((torch.float32,)) if isinstance(c.pattern, SortedChunks)][:6]
)
def test_sorted_chunks_are_not_rewritten(case):
    assert not testing.run_case(BlockedLocalBackend(inner="sdpa"), case).failure


LOCAL = {
    "led": (zoo.led, zoo.led_inputs),
    "longformer": (zoo.longformer, zoo.longformer_inputs),
    "longt5 local": (lambda: zoo.longt5(kind="local"), zoo.longt5_inputs),
    "longt5 tglobal": (lambda: zoo.longt5(kind="transient-global"), zoo.longt5_inputs),
    "reformer": (zoo.reformer, zoo.causal_inputs),
}


@pytest.mark.parametrize("name", ["blocked-local", "lsh"])
@pytest.mark.parametrize("family", LOCAL)
def test_local_models_need_no_options_and_are_exact(family, name):
    build, inputs = LOCAL[family]
    report = attnzoo.verify(build(), inputs(32, "left"), name, inner="sdpa")
    assert report.ok, str(report)
    assert not report.changed and report.original and all(site.recall is None for site in report.sites)
    assert all(not verdict.changes and verdict.runs for verdict in attnzoo.explain(build(), name))


def test_short_inputs_of_a_local_site_are_not_rewritten():
    """Reformer computes inputs of at most one chunk by dense attention."""
    model = zoo.reformer()
    with torch.no_grad():
        expected = model(zoo.ids(1, 4)).logits
        with attnzoo.patch(model, "blocked-local", inner="sdpa") as handle:
            torch.testing.assert_close(model(zoo.ids(1, 4)).logits, expected, rtol=0, atol=1e-4)
    assert not any(site.approximate for site in handle.sites)


def test_unused_options_are_refused():
    model = zoo.reformer()
    for call in (attnzoo.patch, attnzoo.explain):
        words = (
            "options of backend 'blocked-local': got window=8, sinks=1;",
            "allowed: no options",
            "already local",
        )
        assert_refused(lambda call=call: call(model, "blocked-local", window=8, sinks=1, inner="sdpa"), *words)
    assert not any("forward" in vars(module) for module in model.modules())
    assert_refused(lambda: attnzoo.patch(model, {"*.0.*": local(8), "*": "sdpa"}), "got window=8")
    with attnzoo.patch(zoo.led(), local(8)):
        pass
    with attnzoo.patch(model, "blocked-local", inner="sdpa"):
        pass


def test_a_dense_site_in_a_local_model_needs_all_options():
    assert_refused(lambda: attnzoo.patch(zoo.led(), "lsh", num_hashes=2), "decoder", "for chunk_length, num_buckets")


def test_options_change_only_the_dense_sites():
    model, inputs = zoo.led(), zoo.led_inputs(26, "left")
    with attnzoo.patch(model, "blocked-local", window=3, inner="sdpa") as handle, torch.no_grad():
        model(**inputs)
    approximate = {
        site.name.rpartition("layers.")[2]: site.approximate for site in handle.sites if "decoder" in site.name
    }
    cross, decoder = ("0.encoder_attn", "1.encoder_attn"), ("0.self_attn", "1.self_attn")
    assert approximate == {**dict.fromkeys(decoder, "window of 3 keys"), **dict.fromkeys(cross, "")}
    assert not any(site.approximate for site in handle.sites if "encoder.layers" in site.name)


# Dense models


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_verify_checks_the_changed_pattern(side):
    report = attnzoo.verify(
        zoo.gpt_neox(), zoo.causal_inputs(26, side), "blocked-local", window=6, sinks=2, inner="sdpa"
    )
    assert report.ok, str(report)
    assert report.changed == "window of 6 keys and 2 sinks" and not report.original
    assert report.distance["logits"] > 0.1
    assert all(0.1 < site.recall < 0.9 for site in report.sites)
    text = " ".join(str(report).split())  # without line breaks
    assert "computes the changed pattern: window of 6 keys and 2 sinks" in text and "recall: 0." in text
    assert report.to_dict()["changed"] == report.changed and report.to_dict()["distance"] == report.distance


def test_verify_detects_another_window_than_requested(request):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(BlockedLocalBackend):
        name: ClassVar[str] = "wrong-window"

        def run(self, attention, probabilities=False):
            return local(self.window + 1).run(attention)

    attnzoo.register_backend(Wrong)
    request.addfinalizer(lambda: attnzoo.unregister_backend("wrong-window"))
    report = attnzoo.verify(zoo.gpt_neox(), zoo.causal_inputs(26, "none"), "wrong-window", window=4)
    assert not report.ok and not any(site.ok for site in report.sites)
    assert any(not check.ok for check in report.end_to_end)


def test_a_window_as_long_as_the_input_gives_the_original_output():
    model, inputs = zoo.gpt_neox(), zoo.causal_inputs(26, "left")
    report = attnzoo.verify(model, inputs, "blocked-local", window=26, inner="sdpa")
    assert report.ok and report.distance["logits"] < 1e-4
    assert all(site.recall == pytest.approx(1.0) for site in report.sites)


@pytest.mark.parametrize("build", [zoo.gpt_neox, lambda: zoo.gpt_bigcode(multi_query=True)], ids=["neox", "mqa"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_chunks_of_new_tokens_on_a_cache_equal_one_forward(build, side, static, sinks):
    model, inputs = build(), zoo.causal_inputs(24, side)
    with torch.no_grad():
        full = model(**inputs).logits
        with attnzoo.patch(model, "blocked-local", window=5, sinks=sinks, inner="sdpa"):
            got, whole = chunked(model, inputs, (13, 1, 1, 4, 2, 1, 2), static), in_one_forward(model, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], whole[real], rtol=0, atol=2e-5 * float(whole.abs().max()))
    assert (full - whole)[real].abs().max() > 0.1 * whole.abs().max(), "the window changes something"


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_generation_gives_the_same_tokens_with_and_without_a_cache(side, static):
    model, prompt = zoo.gpt_neox(), zoo.causal_prompt(side)
    options = dict(max_new_tokens=12, do_sample=False, no_repeat_ngram_size=2)
    full = model.generate(**prompt, **options)
    with attnzoo.patch(model, "blocked-local", window=4, sinks=1, inner="sdpa"):
        cached = model.generate(**prompt, **options, **(dict(cache_implementation="static") if static else {}))
        uncached = model.generate(**prompt, **options, use_cache=False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, full)


def test_training_reaches_every_parameter():
    model, inputs = zoo.gpt_neox().train(), zoo.causal_inputs(24, "left")
    with attnzoo.patch(model, "blocked-local", window=5, sinks=2, inner="sdpa"):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


# Refusals and reports


def test_dense_models_need_the_window():
    model = zoo.gpt_neox()
    error = assert_refused(
        lambda: attnzoo.patch(model, "blocked-local"), "gpt_neox.layers.0.attention", "value for window", "window=..."
    )
    assert {reason.field for reasons in error.refusals.values() for reason in reasons} == {"options"}
    assert not any("forward" in vars(module) for module in model.modules())
    assert_refused(
        lambda: attnzoo.attention(*torch.randn(3, 1, 2, 5, 8), backend="blocked-local"),
        "no value for window",
        "window=...",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(window=0), ("window of backend 'blocked-local': got 0", "an integer >= 2")),
        (dict(window=-3), ("window", "got -3")),
        (dict(window=1.5), ("window", "got 1.5")),
        (dict(window=True), ("window", "got True")),
        (dict(window=8, sinks=-1), ("sinks", "got -1", "an integer >= 0")),
        (dict(windw=8), ("'windw'", "did you mean 'window'?")),
        (dict(window=8, kept=True), ("'kept'", "'inner', 'sinks', 'window'")),
        (dict(window=8, inner="sdap"), ("inner of backend 'blocked-local': got 'sdap'", "did you mean 'sdpa'?")),
        (dict(window=8, inner="lsh"), ("inner of", "got 'lsh'", "allowed: 'auto', 'eager'")),
        (dict(window=8, inner="native"), ("inner of", "got 'native'", "allowed: 'auto', 'eager'")),
        (dict(window=8, inner=3), ("inner of", "got 3", "allowed: 'auto', 'eager'")),
    ],
)
def test_bad_options_name_the_argument(options, words):
    assert_refused(lambda: attnzoo.patch(zoo.gpt_neox(), "blocked-local", **options), *words)


def test_refusals_of_the_inner_backend_are_reported():
    request = replace(attention(Causal(), None).request(), device="tpu")
    assert any(reason.field == "device" for reason in local(4).refusals(request))
    biased = attention(Causal(), None, bias=True).request()
    assert "bias" in {reason.field for reason in local(4, inner="flash_attention_2").refusals(biased)}


def test_several_dense_segments_are_refused():
    whole = attention(Causal(), None)
    twice = replace(whole, segments=whole.segments * 2)
    (refusal,) = local(4).refusals(twice.request())
    assert refusal.field == "segments" and "2 segments" in refusal.got


@pytest.mark.parametrize("name", ["blocked-local", "lsh"])
def test_auto_never_changes_a_pattern(name):
    for pattern in (Causal(), Window(2, 2)):
        request = attention(pattern, None).request()
        assert name not in {backend.name for backend in registry.supporting_backends(request)}
    assert not attnzoo.backends()[name].exact and attnzoo.backends()[name].available


def test_a_refused_site_is_not_marked_approximate():
    model, inputs = zoo.gpt_neox(), zoo.causal_inputs(16, "none")
    assert not any(verdict.runs or verdict.changes for verdict in attnzoo.explain(model, "blocked-local"))
    with attnzoo.patch(model, "blocked-local", fallback="native") as handle:
        assert "None" not in str(handle) and not any(site.approximate for site in handle.sites)
        model(**inputs)
    assert all(site.fallbacks == 1 and not site.approximate for site in handle.sites)


def test_explain_and_handle_mark_sites_as_approximate():
    model, inputs = zoo.gpt_neox(), zoo.causal_inputs(16, "none")
    explained = attnzoo.explain(model, "blocked-local", window=6, sinks=2)
    assert all(verdict.runs and verdict.changes == ("window of 6 keys and 2 sinks",) for verdict in explained)
    assert "blocked-local: runs, approximate: window of 6 keys and 2 sinks" in str(explained)
    assert_refused(lambda: attnzoo.explain(model, window=6), "options", "without a backend")
    with attnzoo.patch(model, "blocked-local", window=6, sinks=2, inner="sdpa") as handle:
        assert all(site.approximate == "window of 6 keys and 2 sinks" for site in handle.sites)
        assert "approximate: window of 6 keys and 2 sinks" in " ".join(str(handle).split())
        model(**inputs)
    assert all(site.changed == {"window of 6 keys and 2 sinks": 1} for site in handle.sites)
    assert {site.kernel for site in handle.sites} == {"flash_cpu"}
    with attnzoo.patch(model, "sdpa") as handle:
        assert "approximate" not in str(handle)


def test_a_configured_backend_replaces_its_name():
    model = zoo.gpt_neox()
    with attnzoo.patch(model, local(6)) as handle:
        assert {site.backend for site in handle.sites} == {"blocked-local"}
    with attnzoo.patch(model, {"*.0.attention": local(6), "*": "sdpa"}) as handle:
        assert [site.approximate for site in handle.sites] == ["window of 6 keys", ""]
    assert_refused(lambda: attnzoo.patch(model, local(6), window=7), "options", "window")
