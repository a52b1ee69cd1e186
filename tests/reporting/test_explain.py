"""``explain`` shows what each backend does at each site, and why a backend refuses."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

import attnzoo
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
