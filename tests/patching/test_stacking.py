"""Patches stack, the last one is removed first; deep copies of a patched model are patched separately."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import attnzoo
from attnzoo import PatchError
from attnzoo.backends.sdpa.backend import SdpaBackend
from tests.support.subject import calls, removals


def test_patches_stack_last_in_first_out(subject):
    native = subject.logits()
    first = attnzoo.patch(subject.model, "sdpa")
    under_sdpa = subject.logits()
    second = attnzoo.patch(subject.model, "eager")
    under_eager = subject.logits()
    assert set(calls(first).values()) == set(calls(second).values())  # one forward each
    second.remove()
    assert torch.equal(subject.logits(), under_sdpa)
    first.remove()
    assert torch.equal(subject.logits(), native)
    if subject.kind == "led":  # the difference shows which of the two ran
        assert not torch.equal(under_eager, under_sdpa)
    assert sum(calls(first).values()) == 2 * subject.attentions
    assert sum(calls(second).values()) == subject.attentions


def test_removing_out_of_order_raises_and_changes_nothing(subject):
    first, second = attnzoo.patch(subject.model, "sdpa"), attnzoo.patch(subject.model, "eager")
    top = subject.logits()
    with pytest.raises(PatchError, match=f"{subject.sites[0]}: .*below a later patch.*last in, first out"):
        first.remove()
    assert first.active and second.active
    assert torch.equal(subject.logits(), top)
    second.remove()
    first.remove()
    assert not first.active and not second.active


def test_a_partly_covered_patch_is_not_removed_at_all(led):
    below = attnzoo.patch(led.model, "sdpa")
    above = attnzoo.patch(led.model, {led.sites[-1]: "eager"})
    top = led.logits()
    with pytest.raises(PatchError, match=led.sites[-1]):
        below.remove()
    assert all("forward" in vars(led.module(number)) for number in range(len(led.sites)))
    assert torch.equal(led.logits(), top)
    above.remove()
    below.remove()


def test_patches_of_different_modules_are_removed_in_any_order(led):
    native = led.logits()
    encoder, decoder = attnzoo.patch(led.model, {"*encoder.l*": "sdpa"}), attnzoo.patch(led.model.led.decoder, "eager")
    encoder.remove()
    led.logits()
    assert (sum(calls(encoder).values()), sum(calls(decoder).values())) == (0, 2)
    decoder.remove()
    assert torch.equal(led.logits(), native)


@removals
def test_leaving_a_context_whose_patch_was_removed_does_nothing(subject, snapshot, remove):
    before = snapshot(subject)
    with attnzoo.patch(subject.model, "sdpa") as handle:
        remove(handle, subject.model)
        before.assert_unchanged()
    before.assert_unchanged()
    with attnzoo.patch(subject.model, "sdpa"), attnzoo.patch(subject.model, "eager") as later:
        later.remove()
    before.assert_unchanged()


def test_removing_twice_does_nothing(subject, snapshot):
    before = snapshot(subject)
    handle = attnzoo.patch(subject.model, "sdpa")
    handle.remove()
    handle.remove()
    before.assert_unchanged()
    with attnzoo.patch(subject.model, "sdpa") as later:
        handle.remove()
        assert later.active


def test_a_context_manager_removes_its_patch_also_on_exceptions(subject, snapshot):
    before = snapshot(subject)
    with (
        pytest.raises(KeyError, match="in the middle"),
        attnzoo.patch(subject.model, "sdpa") as outer,
        attnzoo.patch(subject.model, "eager") as inner,
    ):
        assert outer.active and inner.active
        raise KeyError("in the middle")
    assert not outer.active and not inner.active
    before.assert_unchanged()


def test_an_exception_inside_a_forward_does_not_disturb_the_patch(neox, monkeypatch):
    native, run = neox.logits(), SdpaBackend.run
    with attnzoo.patch(neox.model, "sdpa") as handle:
        monkeypatch.setattr(SdpaBackend, "run", lambda *a, **k: (_ for _ in ()).throw(MemoryError("out of memory")))
        with pytest.raises(MemoryError):
            neox.logits()
        assert set(calls(handle).values()) == {0}
        monkeypatch.setattr(SdpaBackend, "run", run)
        assert neox.close(neox.logits(), native)
    assert torch.equal(neox.logits(), native)


def test_unpatch_removes_the_last_patch(subject, snapshot):
    before = snapshot(subject)
    attnzoo.patch(subject.model, "sdpa")
    under_sdpa = subject.logits()
    attnzoo.patch(subject.model, "eager")
    attnzoo.unpatch(subject.model)
    assert torch.equal(subject.logits(), under_sdpa)
    attnzoo.unpatch(subject.model)
    before.assert_unchanged()
    with pytest.raises(PatchError, match="which is not patched; allowed: a patched model"):
        attnzoo.unpatch(subject.model)
    before.assert_unchanged()


# Copies


def test_a_deep_copy_computes_the_same_and_is_unpatched_separately(subject):
    native = subject.logits()
    handle = attnzoo.patch(subject.model, "sdpa")
    patched = subject.logits()
    counted = calls(handle)
    twin = copy.deepcopy(subject.model)
    assert torch.equal(subject.logits(twin), patched)
    assert calls(handle) == counted, "the copy's calls are not the original's"

    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(subject.logits(), patched), "the copy has separate weights"
    twin.load_state_dict(subject.model.state_dict())

    attnzoo.unpatch(twin)
    assert all("forward" not in vars(module) for module in twin.modules())
    assert torch.equal(subject.logits(twin), native)
    assert torch.equal(subject.logits(), patched)
    assert handle.active
    handle.remove()
    assert torch.equal(subject.logits(), native)


def test_a_deep_copy_outlives_the_originals_patch(subject):
    native = subject.logits()
    handle = attnzoo.patch(subject.model, "sdpa")
    attnzoo.patch(subject.model, "eager")
    top = subject.logits()
    twin = copy.deepcopy(subject.model)
    attnzoo.unpatch(subject.model)
    handle.remove()
    assert torch.equal(subject.logits(), native)
    assert torch.equal(subject.logits(twin), top)
    attnzoo.unpatch(twin)
    attnzoo.unpatch(twin)
    assert torch.equal(subject.logits(twin), native)
    with pytest.raises(PatchError):
        attnzoo.unpatch(twin)


def test_a_deep_copy_of_a_part_is_unpatched_separately(led):
    native, decoder = led.logits(), led.model.led.decoder
    with attnzoo.patch(led.model, "sdpa") as below, attnzoo.patch(decoder, "eager"):
        patched = led.logits()
        led.model.led.decoder = copy.deepcopy(decoder)
        assert torch.equal(led.logits(), patched)
        assert not sum(site.calls for site in below.sites if "decoder" in site.name)
        attnzoo.unpatch(led.model.led.decoder)
        assert led.close(led.logits(), native)
        attnzoo.unpatch(led.model.led.decoder)
        assert all("forward" not in vars(module) for module in led.model.led.decoder.modules())
        with pytest.raises(PatchError, match="not patched"):
            attnzoo.unpatch(led.model.led.decoder)
        led.model.led.decoder = decoder
        assert torch.equal(led.logits(), patched), "the original's patches are where they were"
    assert torch.equal(led.logits(), native)


def test_pickling_a_patched_model_raises_with_a_remedy(subject):
    native = subject.logits()
    with attnzoo.patch(subject.model, "sdpa") as handle:
        for save in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
            with pytest.raises(PatchError, match=r"cannot be pickled; allowed: model\.save_pretrained.*unpatch"):
                save(subject.model)
        assert handle.active
    assert torch.equal(subject.logits(pickle.loads(pickle.dumps(subject.model))), native)
