"""``explain`` shows what each backend does at each site, and why a backend refuses."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers.models.led import modeling_led

import attnzoo
from attnzoo.reporting.explain import Explanation, Verdict
from tests.support.models import gpt_neox, led, reformer


def test_explain_lists_every_site_and_backend():
    explanation = attnzoo.explain(led())
    assert {verdict.backend for verdict in explanation} == set(attnzoo.backends())
    assert len({verdict.site for verdict in explanation}) == 6
    assert all(verdict.runs for verdict in explanation if verdict.backend in ("eager", "sdpa"))
    assert "and 3 more" in str(explanation) and "sdpa: runs" in str(explanation)
    only = attnzoo.explain(led(), "sdpa")
    assert {verdict.backend for verdict in only} == {"sdpa"}
    with pytest.raises(attnzoo.UnknownNameError, match="did you mean 'sdpa'"):
        attnzoo.explain(led(), "spda")


def test_explain_accepts_a_configured_backend():
    model = gpt_neox()
    configured = attnzoo.configure("blocked-local", window=6)
    verdicts = attnzoo.explain(model, configured)
    assert verdicts == attnzoo.explain(model, "blocked-local", window=6)
    assert [verdict.changes for verdict in verdicts] == [("window of 6 keys",)] * 2 and not verdicts.auto
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"options: got \['sinks'\] with backend .*Blocked"):
        attnzoo.explain(model, configured, sinks=1)
    with pytest.raises(attnzoo.InvalidArgumentError, match="blocked-local': got window=6; allowed: no options"):
        attnzoo.explain(reformer(), configured)


def test_explain_shows_refusals():
    @attnzoo.register_backend
    @dataclass(frozen=True)
    class Narrow(attnzoo.Backend):
        name: ClassVar[str] = "narrow"
        capabilities: ClassVar[attnzoo.Capabilities] = attnzoo.Capabilities(devices=frozenset({"cuda"}))

    try:
        (verdict, *_) = attnzoo.explain(led(), "narrow")
        assert not verdict.runs
        assert {reason.field for reason in verdict.refusals} >= {"device", "pattern", "key_mask", "segments"}
        assert "device: got cpu; allowed: cuda" in str(attnzoo.explain(led(), "narrow"))
    finally:
        attnzoo.unregister_backend("narrow")


def test_explain_and_patch_refuse_a_replaced_forward():
    model = led()
    module = model.led.encoder.layers[0].self_attn.longformer_self_attn
    module.forward = lambda *args, **kwargs: None
    verdicts = [verdict for verdict in attnzoo.explain(model, "sdpa") if not verdict.runs]
    assert [verdict.site for verdict in verdicts] == ["led.encoder.layers.0.self_attn.longformer_self_attn"]
    with pytest.raises(attnzoo.PatchError, match="forward was replaced"):
        attnzoo.patch(model, "sdpa")


def verdict(site, **changes):
    return Verdict(**{**dict(site=site, cls="Attention", pattern="causal", backend="sdpa", refusals=()), **changes})


OTHERS = {
    "class": dict(cls="Other"),
    "pattern": dict(pattern="full"),
    "refusal": dict(refusals=(attnzoo.Refusal("dtype", "float64", "float32"),)),
    "change": dict(changes=("window of 4 keys",)),
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_sites_print_together_only_if_all_that_is_printed_is_equal(changes):
    same = str(Explanation([verdict("one"), verdict("two")]))
    assert same.count("sdpa: ") == 1 and "one and 1 more" in same
    other = str(Explanation([verdict("one"), verdict("two", **changes)]))
    assert other.count("sdpa: ") == 2 and "two" in other


def test_sites_with_other_choices_of_auto_print_separately():
    text = str(Explanation([verdict("one"), verdict("two")], {"one": ("eager here",), "two": ("sdpa here",)}))
    assert "  auto: eager here" in text and "  auto: sdpa here" in text


def test_drift_of_a_companion_refuses_only_the_sites_it_covers(monkeypatch):
    """The mask function of LED has changed. A GPT-NeoX in the same model does not use it."""
    model = torch.nn.ModuleDict({"led": led(), "neox": gpt_neox()})
    monkeypatch.setattr(modeling_led, "_prepare_4d_attention_mask_inverted", lambda *args, **kwargs: None)
    runs = {verdict.site: verdict.runs for verdict in attnzoo.explain(model, "sdpa")}
    assert {site for site, run in runs.items() if not run} == {site for site in runs if ".encoder." in site}
    assert any(site.startswith("neox") for site in runs)
    with pytest.raises(attnzoo.DriftError, match="_prepare_4d_attention_mask_inverted"):
        attnzoo.patch(model, "sdpa")
    attnzoo.patch(model, {"neox.*": "sdpa", "led.*.decoder.*": "sdpa"}).remove()
