"""The requested backend runs, or ``patch`` raises and changes nothing."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo import BackendRefusedError, PatchError, Refusal, UnknownNameError
from tests.support.subject import build_subject, calls

# Requested == executed


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_every_site_runs_the_requested_backend_and_counts_its_calls(subject, backend):
    """``test_what_ran.py`` compares these counts with independent witnesses."""
    native = subject.logits()
    handle = attnzoo.patch(subject.model, backend)
    assert tuple(site.name for site in handle.sites) == subject.sites
    assert {site.backend for site in handle.sites} == {backend}
    assert {site.calls for site in handle.sites} == {0}
    assert {site.kernel for site in handle.sites} == {None}

    patched = subject.logits()
    subject.logits()
    assert sum(site.calls for site in handle.sites) == 2 * subject.attentions
    assert all(site.calls and site.kernel and not site.fallbacks for site in handle.sites)
    assert subject.close(patched, native)


def test_a_site_has_the_class_and_the_pattern_of_its_module(led):
    first = attnzoo.patch(led.model, "sdpa").sites[0]
    assert first.cls == "LEDEncoderSelfAttention"
    assert first.pattern == "window 4 + global keys"


def test_a_site_lists_its_kernels_most_frequent_first(led):
    with attnzoo.patch(led.model, "eager") as handle:
        led.logits()
    site = handle.sites[0]
    assert (site.kernel, site.kernels) == ("eager", Counter(eager=2))
    site.kernels["other"] = 7
    assert (site.kernel, site.calls) == ("other+eager", 9)


def test_native_runs_the_models_own_code_and_counts_it(subject):
    native = subject.logits()
    with attnzoo.patch(subject.model, "native") as handle:
        assert torch.equal(subject.logits(), native)
    assert {(site.backend, site.kernel, site.calls) for site in handle.sites} == {("native", "native", 1)}


def test_native_over_another_patch_runs_the_models_own_code(subject):
    native = subject.logits()
    with attnzoo.patch(subject.model, "sdpa") as below, attnzoo.patch(subject.model, "native") as above:
        assert torch.equal(subject.logits(), native)
    assert set(calls(above).values()) == {1}
    assert set(calls(below).values()) == {0}


def test_auto_selects_and_the_site_reports_what_ran(subject, monkeypatch):
    """On tiny models, the rule selects the model's code. By priority, a backend runs."""
    native = subject.logits()
    with attnzoo.patch(subject.model) as handle:
        assert torch.equal(subject.logits(), native)
        assert {(site.backend, site.kernel) for site in handle.sites} == {("auto", "native")}
        assert all(str(choice).startswith("native: by rule") for site in handle.sites for choice in site.selections)
    monkeypatch.setenv("ATTNZOO_AUTO", "priority")
    with attnzoo.patch(subject.model) as handle:
        assert subject.close(subject.logits(), native)
    assert all(site.kernel not in (None, "eager", "native") for site in handle.sites)


def test_a_site_reports_the_backends_name_for_an_alias(neox, add_backend):
    cls = add_backend("fake", aliases=("imitation",))
    with attnzoo.patch(neox.model, "imitation") as handle:
        neox.logits()
    assert {(site.backend, site.kernel) for site in handle.sites} == {("fake", "fake-kernel")}
    assert len(cls.runs) == sum(calls(handle).values()) == neox.attentions


def test_a_part_of_a_model_can_be_patched(led):
    native = led.logits()
    with attnzoo.patch(led.model.led.decoder, "eager") as handle:
        assert led.close(led.logits(), native)
        assert [site.name for site in handle.sites] == ["layers.0.self_attn", "layers.0.encoder_attn"]
        assert set(calls(handle).values()) == {1}
    assert torch.equal(led.logits(), native)


def test_a_patch_that_reaches_no_site_raises(led):
    with pytest.raises(PatchError, match=r"model: got .*no adapter supports its .*gpt_neox.*led"):
        attnzoo.patch(led.model.lm_head, "sdpa")


# All or nothing


def test_a_refused_site_leaves_every_module_untouched(led, add_backend, snapshot):
    before = snapshot(led)
    add_backend("one-segment", segments=1)  # the decoder could run; the encoder unites two segments
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.patch(led.model, "one-segment")
    before.assert_unchanged()
    assert list(caught.value.refusals) == list(led.sites[:2])
    assert caught.value.refusals[led.sites[0]] == (Refusal("segments", "2", "at most 1"),)
    assert {"eager", "sdpa"} <= set(caught.value.alternatives[led.sites[0]])
    assert "segments: got 2; allowed: at most 1" in str(caught.value)


def test_a_refusal_lists_every_reason_for_every_attention_of_a_site(led, add_backend):
    """LED's encoder computes two attentions: ordinary tokens, and global tokens."""
    add_backend("little", segments=1, patterns=frozenset({attnzoo.Window}))
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.patch(led.model, {"led.encoder*": "little"})
    assert set(caught.value.refusals[led.sites[0]]) == {
        Refusal("segments", "2", "at most 1"),
        Refusal("pattern", "Full()", "Window"),
    }


def test_a_refused_patch_leaves_an_earlier_patch_in_place(led, add_backend):
    add_backend("one-segment", segments=1)
    with attnzoo.patch(led.model, "sdpa") as handle:
        with pytest.raises(BackendRefusedError):
            attnzoo.patch(led.model, "one-segment")
        led.logits()
        assert all(calls(handle).values())


def test_a_refusal_of_one_of_several_backends_leaves_every_module_untouched(led, add_backend, snapshot):
    before = snapshot(led)
    add_backend("one-segment", segments=1)
    with pytest.raises(BackendRefusedError):
        attnzoo.patch(led.model, {"led.decoder*": "sdpa", "*": "one-segment"})
    before.assert_unchanged()


def test_training_requests_are_refused_at_patch_time(add_backend, snapshot):
    led = build_subject("led", attention_dropout=0.25)
    before = snapshot(led)
    add_backend("inference", dropout=False, grad=False)
    led.model.train()
    with pytest.raises(BackendRefusedError, match=r"dropout: got True; allowed: dropout=0\.0") as caught:
        attnzoo.patch(led.model, "inference")
    assert "grad: got True" in str(caught.value)
    led.model.eval()
    before.assert_unchanged()
    with attnzoo.patch(led.model, "inference") as handle:
        led.logits()
    assert all(calls(handle).values())


def test_training_requests_after_the_patch_are_refused_before_the_call(add_backend):
    led = build_subject("led", attention_dropout=0.25)
    fake = add_backend("inference", dropout=False)
    with attnzoo.patch(led.model, "inference"):
        led.model.train()
        with pytest.raises(BackendRefusedError, match="dropout"):
            led.model(**led.inputs)
    assert not fake.runs


# Mappings


def test_globs_assign_backends_and_the_first_match_decides(led):
    native = led.logits()
    globs = {"*.layers.0.self_attn.longformer_self_attn": "eager", "led.encoder.*": "sdpa", "*.encoder_attn": "native"}
    handle = attnzoo.patch(led.model, globs)
    assert led.close(led.logits(), native)
    got = {site.name: (site.backend, site.kernel) for site in handle.sites}
    assert list(got) == [led.sites[0], led.sites[1], led.sites[3]]
    assert got[led.sites[0]] == ("eager", "eager")
    assert got[led.sites[1]][0] == "sdpa"
    assert set(got[led.sites[1]][1].split("+")).isdisjoint({"eager", "native"})
    assert got[led.sites[3]] == ("native", "native")
    assert "forward" not in vars(led.module(2)), "no glob matches it"
    handle.remove()
    assert torch.equal(led.logits(), native)


def test_a_glob_that_matches_nothing_raises(led, snapshot):
    before = snapshot(led)
    with pytest.raises(PatchError, match=r"backend: got glob 'encoder\.\*', which matches no site.*led\.encoder"):
        attnzoo.patch(led.model, {"led.decoder*": "sdpa", "encoder.*": "eager"})
    before.assert_unchanged()


@pytest.mark.parametrize("glob", ["*decoder*", "led.*", "*attn*"])
def test_a_glob_behind_a_wider_one_raises(led, snapshot, glob):
    """The order is also wrong if both globs match the same sites."""
    before = snapshot(led)
    named = re.escape(f"got glob {glob!r} after '*', but '*' matches all sites of {glob!r}")
    with pytest.raises(PatchError, match=named + ".*; allowed: narrower globs before"):
        attnzoo.patch(led.model, {"*": "native", glob: "sdpa"})
    before.assert_unchanged()


def test_a_glob_for_the_remaining_sites_may_have_none_left(led):
    globs = {"*self_attn*": "sdpa", "*encoder_attn*": "native", "*coder*": "eager", "*": "eager"}
    handle = attnzoo.patch(led.model, globs)
    assert {site.backend for site in handle.sites} == {"sdpa", "native"}


def test_options_reach_the_backend(neox, add_backend):
    seen = []

    @attnzoo.register_backend
    @dataclass(frozen=True)
    class WithOptions(add_backend("base")):
        name: ClassVar[str] = "with-options"
        window: int = 3

        def run(self, attention, probabilities=False):
            seen.append(self.window)
            return super().run(attention, probabilities)

    with attnzoo.patch(neox.model, "with-options", window=5):
        neox.logits()
    with pytest.raises(UnknownNameError, match=r"option of backend 'with-options': got 'windw' .did you mean 'window'"):
        attnzoo.patch(neox.model, "with-options", windw=5)
    assert seen == [5, 5]


@pytest.mark.parametrize("other", ["auto", "native", attnzoo.configure("blocked-local", window=3)])
def test_options_go_to_the_named_backend_only(neox, other):
    with attnzoo.patch(neox.model, {"*.0.*": "blocked-local", "*": other}, window=7) as handle:
        neox.logits()
    assert handle.sites[0].approximate == "window of 7 keys"
    assert handle.sites[1].approximate in ("", "window of 3 keys")


def test_messages_name_the_class_where_the_model_is_the_module(neox):
    with attnzoo.patch(neox.module(), "sdpa"), pytest.raises(attnzoo.InvalidArgumentError, match="GPTNeoXAttention"):
        neox.module()(torch.empty(1, 0, 16), None)
