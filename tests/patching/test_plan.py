"""The plan of a site: ``patch`` and ``explain`` decide alike, and a refusal names its stage."""

from __future__ import annotations

import pytest
import torch

import attnzoo
from attnzoo import BackendRefusedError, DriftError
from attnzoo.patching.plan import BUILT_IN, plan_sites
from attnzoo.patching.sites import find_sites
from tests.support.subject import mask_with_hole


def plans_of(model, backend):
    targets = find_sites(model)
    return plan_sites(model, targets, {target: backend for target in targets if target.point.attends})


def test_a_refusal_names_its_stage(neox, add_backend):
    add_backend("narrow", grad=False, mask=False)
    with attnzoo.patch(neox.model, "narrow"):
        with pytest.raises(BackendRefusedError, match=r"^backend 'narrow' refuses before the call\n") as caught:
            neox.model(**neox.inputs)
        assert caught.value.stage == "before the call"
        with pytest.raises(BackendRefusedError, match=r"^backend 'narrow' refuses in the call\n") as caught:
            neox.logits(**mask_with_hole(neox))
        assert caught.value.stage == "in the call" and list(caught.value.refusals) == [neox.sites[0]]
    neox.model.train()
    with pytest.raises(BackendRefusedError, match=r"^backend 'narrow' refuses at patch time\n") as caught:
        attnzoo.patch(neox.model, "narrow")
    assert caught.value.stage == "patch"


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
def test_attention_refuses_in_the_call(backend):
    q = k = v = torch.ones(1, 1, 2, 4, device="meta")
    message = f"^backend '{backend}' refuses in the call\n  attention:\n"
    with pytest.raises(BackendRefusedError, match=message) as caught:
        attnzoo.attention(q, k, v, backend=backend)
    assert caught.value.stage == "in the call"


def test_a_plan_has_all_that_patch_and_explain_need(led, add_backend):
    add_backend("one-segment", segments=1)
    refused, *_, supported = [plan for plan in plans_of(led.model, attnzoo.configure("one-segment")) if plan.requests]
    assert refused.target.name == led.sites[0] and supported.target.name == led.sites[-1]
    assert refused.refusals == (attnzoo.Refusal("segments", "2", "at most 1"),) and not supported.refusals
    assert {"sdpa", "eager"} <= set(refused.alternatives) and supported.alternatives is None
    assert refused.obstacle is None and refused.changes == ()


def test_auto_and_native_are_planned_like_other_backends(led):
    for name in ("auto", "native"):
        plans = plans_of(led.model, BUILT_IN[name])
        assert [plan.target.name for plan in plans if plan.target.point.attends] == list(led.sites)
        assert not any(plan.refusals or plan.changes or plan.obstacle for plan in plans)
        assert name not in attnzoo.backends()
    assert all(plan.target.point.attends for plan in plans), "native needs no companion"
    assert {verdict.backend for verdict in attnzoo.explain(led.model, "native") if verdict.runs} == {"native"}


def test_explain_shows_the_drift_of_a_companion(led, monkeypatch):
    """The module that makes the encoder's mask is patched with the attention of the encoder, not of the decoder."""

    def check_drift(self, point, module=None):
        if point.cls.endswith(":LEDEncoder"):
            raise DriftError("LEDEncoder.forward: got other code; allowed: the verified code")

    monkeypatch.setattr(attnzoo.Adapter, "check_drift", check_drift)
    with pytest.raises(DriftError, match=r"LEDEncoder\.forward"):
        attnzoo.patch(led.model, "sdpa")
    verdicts = {verdict.site: verdict for verdict in attnzoo.explain(led.model, "sdpa")}
    refused = [name for name, verdict in verdicts.items() if not verdict.runs]
    assert refused == [name for name in led.sites if "encoder.l" in name]
    assert "LEDEncoder.forward: got other code" in str(verdicts[led.sites[0]].refusals[0])
    attnzoo.patch(led.model, {"*decoder*": "sdpa"}).remove()


def test_an_alternative_supports_every_request_of_the_site(led, add_backend):
    """LED's encoder has attentions of one and of two segments. A backend that supports only one is no alternative."""
    add_backend("one-segment", segments=1)
    add_backend("no-backend", segments=1, key_mask=False)
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.patch(led.model, {led.sites[0]: "no-backend"})
    assert set(caught.value.alternatives[led.sites[0]]) >= {"eager", "sdpa"}
    assert "one-segment" not in caught.value.alternatives[led.sites[0]]
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.patch(led.model, {led.sites[2]: "no-backend"})
    assert "one-segment" in caught.value.alternatives[led.sites[2]]


@pytest.mark.parametrize("by_keyword", [False, True])
def test_an_input_that_requires_grad_is_seen_before_the_call(led, add_backend, by_keyword):
    """All weights are frozen, so only the input shows that the call needs gradients."""
    fake = add_backend("forward-only", grad=False)
    led.model.requires_grad_(False)
    module, states = led.module(2), torch.randn(2, 6, 16, requires_grad=True)
    given = ((), dict(hidden_states=states)) if by_keyword else ((states,), {})
    with attnzoo.patch(led.model, "forward-only", fallback="native") as handle:
        output = module(*given[0], **given[1])[0]
        assert output.requires_grad and not fake.runs
        assert {site.name: site.fallbacks for site in handle.sites if site.fallbacks} == {led.sites[2]: 1}
        module(states.detach())
        assert len(fake.runs) == 1
    with attnzoo.patch(led.model, "forward-only"), pytest.raises(BackendRefusedError, match="before the call"):
        module(*given[0], **given[1])
