"""What is asked for is what runs, or an exception and nothing was changed."""

from __future__ import annotations

import copy
import gc
import re
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo import BackendRefusedError, PatchError, Refusal, UnknownNameError
from attnzoo.backends.eager import EagerBackend
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.patching import interface
from tests.patching.conftest import calls

CLASSES = {"eager": EagerBackend, "sdpa": SdpaBackend}


def count_runs(monkeypatch, cls):
    """Count what a backend really computes, independently of the library's own book-keeping."""
    counted, run = Counter(), cls.run

    def counting(self, attention, probabilities=False):
        result = run(self, attention, probabilities)
        counted[result.kernel] += 1
        return result

    monkeypatch.setattr(cls, "run", counting)
    return counted


# Requested == executed


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_every_site_runs_what_was_asked_for_and_counts_it(subject, backend, monkeypatch):
    counted, native = count_runs(monkeypatch, CLASSES[backend]), subject.logits()
    handle = attnzoo.patch(subject.model, backend)
    assert tuple(site.name for site in handle.sites) == subject.sites
    assert {site.backend for site in handle.sites} == {backend}
    assert {site.calls for site in handle.sites} == {0}
    assert {site.kernel for site in handle.sites} == {None}

    patched = subject.logits()
    subject.logits()
    assert counted.total() == 2 * subject.attentions
    assert sum((site.kernels for site in handle.sites), Counter()) == counted
    assert sum(site.calls for site in handle.sites) == counted.total()
    assert all(site.calls and site.kernel and not site.fallbacks for site in handle.sites)
    assert subject.close(patched, native)


def test_sites_say_what_they_are(led):
    first = attnzoo.patch(led.model, "sdpa").sites[0]
    assert first.cls == "LEDEncoderSelfAttention"
    assert first.pattern == "window 4 + global keys"


def test_a_site_reports_the_kernels_that_ran_most_frequent_first(led):
    with attnzoo.patch(led.model, "eager") as handle:
        led.logits()
    site = handle.sites[0]
    assert (site.kernel, site.kernels) == ("eager", Counter(eager=2))
    site.kernels["other"] = 7
    assert (site.kernel, site.calls) == ("other+eager", 9)


def test_native_is_the_models_own_code_counted(subject):
    native = subject.logits()
    with attnzoo.patch(subject.model, "native") as handle:
        assert torch.equal(subject.logits(), native)
    assert {(site.backend, site.kernel, site.calls) for site in handle.sites} == {("native", "native", 1)}


def test_native_over_another_patch_is_the_models_own_code(subject):
    native = subject.logits()
    with attnzoo.patch(subject.model, "sdpa") as below, attnzoo.patch(subject.model, "native") as above:
        assert torch.equal(subject.logits(), native)
    assert set(calls(above).values()) == {1}
    assert set(calls(below).values()) == {0}, "native was asked for and sdpa ran"


def test_auto_chooses_and_says_what_ran(subject):
    native = subject.logits()
    with attnzoo.patch(subject.model) as handle:
        assert subject.close(subject.logits(), native)
    assert {site.backend for site in handle.sites} == {"auto"}
    assert all(site.kernel not in (None, "eager", "native") for site in handle.sites)


def test_an_alias_is_reported_by_the_backends_name(neox, add_backend):
    cls = add_backend("fake", aliases=("imitation",))
    with attnzoo.patch(neox.model, "imitation") as handle:
        neox.logits()
    assert {(site.backend, site.kernel) for site in handle.sites} == {("fake", "fake-kernel")}
    assert cls.runs == sum(calls(handle).values()) == neox.attentions


def test_a_part_of_a_model_can_be_patched(led):
    native = led.logits()
    with attnzoo.patch(led.model.led.decoder, "eager") as handle:
        assert led.close(led.logits(), native)
        assert [site.name for site in handle.sites] == ["layers.0.self_attn", "layers.0.encoder_attn"]
        assert set(calls(handle).values()) == {1}
    assert torch.equal(led.logits(), native)


def test_a_patch_that_reaches_no_site_raises(led):
    with pytest.raises(PatchError, match=r"model: got .*no adapter finds an attention module.*gpt_neox.*led"):
        attnzoo.patch(led.model.lm_head, "sdpa")


# All or nothing


def test_a_refused_site_leaves_every_module_untouched(led, add_backend, as_it_was):
    before = as_it_was(led)
    add_backend("one-segment", segments=1)  # the decoder could run; the encoder unites two segments
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.patch(led.model, "one-segment")
    before.check()
    assert list(caught.value.refusals) == list(led.sites[:2])
    assert caught.value.refusals[led.sites[0]] == (Refusal("segments", "2", "at most 1"),)
    assert {"eager", "sdpa"} <= set(caught.value.alternatives[led.sites[0]])
    assert "segments: got 2; allowed: at most 1" in str(caught.value)


def test_every_reason_of_every_attention_of_a_site_is_listed(led, add_backend):
    """LED's encoder computes two: window and globals together, and the global tokens' own."""
    add_backend("little", segments=1, patterns=frozenset({attnzoo.Window}))
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.patch(led.model, {"led.encoder*": "little"})
    assert set(caught.value.refusals[led.sites[0]]) == {
        Refusal("segments", "2", "at most 1"),
        Refusal("pattern", "Full()", "Window"),
    }


def test_a_refusal_under_an_earlier_patch_leaves_that_patch_alone(led, add_backend):
    add_backend("one-segment", segments=1)
    with attnzoo.patch(led.model, "sdpa") as handle:
        with pytest.raises(BackendRefusedError):
            attnzoo.patch(led.model, "one-segment")
        led.logits()
        assert all(calls(handle).values())


def test_a_refusal_on_one_of_several_backends_leaves_every_module_untouched(led, add_backend, as_it_was):
    before = as_it_was(led)
    add_backend("one-segment", segments=1)
    with pytest.raises(BackendRefusedError):
        attnzoo.patch(led.model, {"led.decoder*": "sdpa", "*": "one-segment"})
    before.check()


def test_what_training_asks_for_is_refused_at_patch_time(build_subject, add_backend, as_it_was):
    led = build_subject("led", attention_dropout=0.25)
    before = as_it_was(led)
    add_backend("inference", dropout=False, grad=False)
    led.model.train()
    with pytest.raises(BackendRefusedError, match=r"dropout: got requested; allowed: dropout=0\.0") as caught:
        attnzoo.patch(led.model, "inference")
    assert "grad: got requested" in str(caught.value)
    led.model.eval()
    before.check()
    with attnzoo.patch(led.model, "inference") as handle:
        led.logits()
    assert all(calls(handle).values())


def test_switching_to_training_after_the_patch_is_refused_before_anything_runs(build_subject, add_backend):
    led = build_subject("led", attention_dropout=0.25)
    fake = add_backend("inference", dropout=False)
    with attnzoo.patch(led.model, "inference"):
        led.model.train()
        with pytest.raises(BackendRefusedError, match="dropout"):
            led.model(**led.inputs)
    assert fake.runs == 0


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
    assert "forward" not in vars(led.module(2)), "no glob matched it: it stays as it is"
    handle.remove()
    assert torch.equal(led.logits(), native)


def test_a_glob_that_matches_nothing_raises(led, as_it_was):
    before = as_it_was(led)
    with pytest.raises(PatchError, match=r"backend: got glob 'encoder\.\*', which matches no site.*led\.encoder"):
        attnzoo.patch(led.model, {"led.decoder*": "sdpa", "encoder.*": "eager"})
    before.check()


@pytest.mark.parametrize("glob", ["*decoder*", "led.*", "*attn*"])
def test_a_glob_behind_a_wider_one_raises(led, as_it_was, glob):
    """Even if it matches as many sites."""
    before = as_it_was(led)
    named = re.escape(f"got glob {glob!r} behind '*', which matches all its sites")
    with pytest.raises(PatchError, match=named + ".*; allowed: narrower globs before"):
        attnzoo.patch(led.model, {"*": "native", glob: "sdpa"})
    before.check()


def test_a_glob_for_the_rest_may_find_none_left(led):
    handle = attnzoo.patch(
        led.model, {"*self_attn*": "sdpa", "*encoder_attn*": "native", "*coder*": "eager", "*": "eager"}
    )
    assert {site.backend for site in handle.sites} == {"sdpa", "native"}


def test_options_reach_the_backend(neox, add_backend):
    seen = []
    base = add_backend("base")

    @dataclass(frozen=True)
    class WithOptions(base):
        name: ClassVar[str] = "with-options"
        window: int = 3

        def run(self, attention, probabilities=False):
            seen.append(self.window)
            return super().run(attention, probabilities)

    attnzoo.register_backend(WithOptions)
    try:
        with attnzoo.patch(neox.model, "with-options", window=5):
            neox.logits()
        with pytest.raises(UnknownNameError, match=r"option of backend 'with-options': got 'windw' .did you mean 'win"):
            attnzoo.patch(neox.model, "with-options", windw=5)
    finally:
        attnzoo.unregister_backend("with-options")
    assert seen == [5, 5]


@pytest.mark.parametrize("other", ["auto", "native", attnzoo.configure("blocked-local", window=3)])
def test_options_are_those_of_the_backend_that_is_named(neox, other):
    with attnzoo.patch(neox.model, {"*.0.*": "blocked-local", "*": other}, window=7) as handle:
        neox.logits()
    assert handle.sites[0].approximate == "window of 7 keys"
    assert handle.sites[1].approximate in ("", "window of 3 keys")


# What people see


def rows_of(handle):
    """The printed table, one list of words per row; a wide terminal wraps nothing."""
    return [line.split() for line in str(handle).splitlines()]


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.mark.usefixtures("wide")
def test_a_handle_prints_as_a_table_with_one_row_for_sites_that_are_alike(led):
    with attnzoo.patch(led.model, "eager") as handle:
        led.logits()
    header, *rows = rows_of(handle)
    assert header == ["backend", "kernel", "calls", "fallbacks", "sites"]
    kinds = {(site.cls, site.pattern): site for site in reversed(handle.sites)}
    assert len(rows) == len(kinds) < len(handle.sites)
    for row, (kind, first) in zip(rows, reversed(kinds.items()), strict=True):
        more = sum((site.cls, site.pattern) == kind for site in handle.sites) - 1
        assert row[:5] == ["eager", "eager", str(first.calls), "0", first.name]
        assert " ".join(row[5:]) == f"and {more} more " * bool(more) + f"({', '.join(kind)})"


@pytest.mark.usefixtures("wide")
def test_sites_at_which_something_else_ran_have_a_row_of_their_own(neox):
    with attnzoo.patch(neox.model, {"*.0.*": "eager", "*": "sdpa"}) as handle:
        assert [row[:4] for row in rows_of(handle)[1:]] == [["eager", "-", "0", "0"], ["sdpa", "-", "0", "0"]]
        neox.logits()
        assert [row[1:3] for row in rows_of(handle)[1:]] == [["eager", "1"], [handle.sites[1].kernel, "1"]]


@pytest.mark.usefixtures("wide")
def test_counts_that_differ_between_alike_sites_print_as_a_range(neox):
    with attnzoo.patch(neox.model, "eager", fallback="native") as handle:
        neox.logits()
    first = handle.sites[0]
    first.kernels["eager"] += 2
    first.fallbacks += 1
    ((backend, kernel, calls, fallbacks, *_),) = rows_of(handle)[1:]
    assert (backend, kernel, calls, fallbacks) == ("eager", "eager", "1-3", "0-1")


@pytest.mark.usefixtures("wide")
def test_a_table_before_the_first_call_shows_that_nothing_ran(neox):
    with attnzoo.patch(neox.model, "sdpa") as handle:
        assert rows_of(handle)[1][:4] == ["sdpa", "-", "0", "0"]


# What is remembered


def test_what_is_remembered_of_a_mask_dies_with_it(neox):
    """A bool mask is its own reading: remembering it would keep every forward's mask for as long as the patch lasts."""
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0
    with attnzoo.patch(neox.model, "sdpa") as handle, torch.no_grad():
        for _ in range(3):
            neox.model(input_ids=torch.full((3, 11), 5), attention_mask=mask)
        gc.collect()
        assert not any(len(forward._attend._memory) for forward in handle.forwards)


def test_what_is_remembered_in_inference_mode_is_for_inference_mode(neox):
    """It cannot be saved for a backward, though it be made of a tensor that can."""
    mask = torch.ones(3, 11)
    with attnzoo.patch(neox.model, "sdpa") as handle:
        first, second = (forward._attend.cached_per_forward for forward in handle.forwards[:2])
        with torch.inference_mode():
            made = first(mask, "more", lambda tensor: tensor + 1)
        assert not second(mask, "more", lambda tensor: tensor + 1).is_inference() and made.is_inference()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_made_of_a_mask_is_made_once_per_forward(neox, mode):
    """Whatever is done to the mask between forwards, even where its version does not tell."""
    with attnzoo.patch(neox.model, "sdpa") as handle, mode():
        mask = torch.ones(3, 11)
        sites = [forward._attend.cached_per_forward for forward in handle.forwards]
        for value in (1.0, 2.0, 3.0):
            mask.data.fill_(value)
            made = [once(mask, "more", lambda tensor: tensor + 1) for once in sites]
            assert all(one is made[0] for one in made) and made[0].eq(value + 1).all()


def test_layers_of_a_copy_share_what_they_remember_and_nothing_with_the_original(neox, monkeypatch):
    read, masks = [], interface.read_attention_mask
    monkeypatch.setattr(interface, "read_attention_mask", lambda *given: read.append(given) or masks(*given))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0
    inputs = dict(input_ids=torch.full((3, 11), 5), attention_mask=mask)
    with attnzoo.patch(neox.model, "sdpa"), torch.no_grad():
        for model in (neox.model, copy.deepcopy(neox.model)):
            read.clear()
            model(**inputs)
            assert len(read) == 1


# Asking a model


def test_a_model_tells_its_patch(subject):
    assert not attnzoo.is_patched(subject.model)
    with pytest.raises(attnzoo.PatchError, match="not patched"):
        attnzoo.handle(subject.model)
    below = attnzoo.patch(subject.model, "sdpa")
    above = attnzoo.patch(subject.model, "eager")
    assert attnzoo.is_patched(subject.model)
    assert attnzoo.handle(subject.model).sites == above.sites
    subject.logits()
    assert all(site.calls for site in attnzoo.handle(subject.model).sites)
    attnzoo.handle(subject.model).remove()
    assert not above.active and attnzoo.handle(subject.model).sites == below.sites


def test_a_deep_copy_tells_its_own_patch(subject):
    original = attnzoo.patch(subject.model, "sdpa")
    twin = copy.deepcopy(subject.model)
    subject.logits(twin)
    assert all(site.calls for site in attnzoo.handle(twin).sites)
    attnzoo.handle(twin).remove()
    assert not attnzoo.is_patched(twin) and original.active


@pytest.mark.parametrize("ask", [attnzoo.is_patched, attnzoo.handle, attnzoo.unpatch])
def test_only_modules_are_asked(ask):
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"model: got str; allowed: a torch\.nn\.Module"):
        ask("led")


# Replacing patches


def test_a_replacing_patch_is_the_only_one(subject, as_it_was):
    before = as_it_was(subject)
    for backend in ("sdpa", "eager", "sdpa"):
        handle = attnzoo.patch(subject.model, backend, replace=True)
        subject.logits()
        assert {site.backend for site in handle.sites} == {backend} and all(site.calls for site in handle.sites)
    handle.remove()
    before.check()


def test_a_replacing_patch_that_is_refused_leaves_the_old_ones(subject):
    old = attnzoo.patch(subject.model, "sdpa")
    with pytest.raises(attnzoo.BackendRefusedError):
        attnzoo.patch(subject.model, "flash", replace=True)
    assert old.active and attnzoo.handle(subject.model).sites == old.sites


def test_replacing_in_a_part_of_a_patched_model_changes_nothing(neox):
    """The part's own patch could go, the model's could not: both stay."""
    outer = attnzoo.patch(neox.model, "sdpa")
    part = neox.model.gpt_neox.layers[1]
    inner = attnzoo.patch(part, "eager")
    with pytest.raises(attnzoo.PatchError, match=r"no longer in place at .*allowed: the whole model that was patched"):
        attnzoo.patch(part, "native", replace=True)
    assert inner.active and outer.active


def test_a_module_that_is_the_model_is_named_by_its_class(neox):
    with attnzoo.patch(neox.module(), "sdpa"), pytest.raises(attnzoo.InvalidArgumentError, match="GPTNeoXAttention"):
        neox.module()(torch.empty(1, 0, 16), None)
