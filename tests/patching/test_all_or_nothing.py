"""A patch that raises halfway, at whatever step, changes nothing: no forward, no hook, no count, no earlier patch."""

from __future__ import annotations

import pytest
import torch

import attnzoo
from attnzoo.patching import engines
from attnzoo.patching.forwards import PatchedForward
from attnzoo.patching.sites import find_sites
from tests.support.subject import Snapshot, calls


class Halfway(Exception):
    """Raised by the step under test."""


def fail_at(monkeypatch, owner, name, call):
    """Replace a method or function by one that raises at its ``call``-th call."""
    original, count = getattr(owner, name), iter(range(1, 1000))

    def failing(*args, **kwargs):
        if next(count) == call:
            raise Halfway(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def fail_in_bind_to_site(monkeypatch, subject):
    fail_at(monkeypatch, type(attnzoo.configure("eager")), "bind_to_site", 2)


def fail_in_bind(monkeypatch, subject):
    # Two modules of the patch are bound and the third is not.
    fail_at(monkeypatch, PatchedForward, "_bind", 3)


def fail_in_describe(monkeypatch, subject):
    for point in {type(target.point) for target in find_sites(subject.model) if target.point.attends}:
        fail_at(monkeypatch, point, "describe", 2)


def fail_in_put(monkeypatch, subject):
    fail_at(monkeypatch, torch.nn.Module, "register_forward_pre_hook", 3)


def fail_in_guard(monkeypatch, subject):
    fail_at(monkeypatch, engines, "guard", 1)


STEPS = {
    "bind_to_site": fail_in_bind_to_site,
    "bind": fail_in_bind,
    "describe": fail_in_describe,
    "put": fail_in_put,
    "guard": fail_in_guard,
}


def hooks_of(model):
    return {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}


@pytest.fixture(params=STEPS.values(), ids=STEPS)
def step(request, monkeypatch):
    """A function that makes one step of the next patch of a subject raise."""
    return lambda subject: request.param(monkeypatch, subject)


def test_a_patch_that_raises_halfway_leaves_the_model_unchanged(subject, step):
    before, hooks = Snapshot(subject), hooks_of(subject.model)
    step(subject)
    with pytest.raises(Halfway):
        attnzoo.patch(subject.model, "eager")
    assert not attnzoo.is_patched(subject.model)
    assert hooks_of(subject.model) == hooks
    assert "init_continuous_batching" not in vars(subject.model)
    before.assert_unchanged()


def test_a_patch_that_raises_halfway_leaves_an_earlier_patch_in_place(subject, step):
    expected = subject.logits()
    with attnzoo.patch(subject.model, "sdpa") as earlier:
        subject.logits()
        counts, hooks = calls(earlier), hooks_of(subject.model)
        step(subject)
        with pytest.raises(Halfway):
            attnzoo.patch(subject.model, "eager")
        assert hooks_of(subject.model) == hooks
        assert earlier.active and attnzoo.handle(subject.model).sites == earlier.sites
        assert calls(earlier) == counts
        assert subject.close(subject.logits(), expected)
        assert calls(earlier) == {name: 2 * count for name, count in counts.items()}
        earlier.remove()
    assert not attnzoo.is_patched(subject.model)
    assert torch.equal(subject.logits(), expected)


def test_a_patch_with_replace_that_raises_while_it_binds_keeps_the_earlier_patches(subject, monkeypatch):
    with attnzoo.patch(subject.model, "sdpa") as below, attnzoo.patch(subject.model, "eager") as above:
        hooks = hooks_of(subject.model)
        fail_in_bind(monkeypatch, subject)
        with pytest.raises(Halfway):
            attnzoo.patch(subject.model, "eager", replace=True)
        assert below.active and above.active
        assert hooks_of(subject.model) == hooks
        subject.logits()
        assert set(calls(below).values()) == {0} and all(calls(above).values())


@pytest.mark.parametrize("replace", [False, True])
def test_a_forward_replaced_by_other_code_is_refused_below_a_native_patch(neox, replace):
    """``native`` runs the replaced forward. Every other backend would compute without it."""
    module, runs = neox.module(), []
    forward = module.forward
    module.forward = lambda *args, **kwargs: (runs.append(1), forward(*args, **kwargs))[1]
    with attnzoo.patch(neox.model, "native") as native:
        with pytest.raises(
            attnzoo.PatchError, match=f"{neox.sites[0]}: got a module whose forward was replaced by .*lambda"
        ):
            attnzoo.patch(neox.model, "eager", replace=replace)
        neox.logits()
        assert native.active and set(calls(native).values()) == {1} and runs == [1]
