"""What is asked for is what runs, or an exception; patches stack and come off exactly."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo import BackendRefusedError, PatchError, Refusal, UnknownNameError
from attnzoo.backends.eager import EagerBackend
from attnzoo.backends.sdpa import SdpaBackend

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


def calls(handle):
    return {site.name: site.calls for site in handle.sites}


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


# Fallback


def test_probabilities_under_a_fused_backend_are_refused_with_the_remedy(subject, as_it_was):
    before = as_it_was(subject)
    with attnzoo.patch(subject.model, "sdpa") as handle:
        with pytest.raises(BackendRefusedError) as caught:
            subject.logits(output_attentions=True)
        assert "attention probabilities: got requested; allowed: output_attentions=False" in str(caught.value)
        assert 'backend="eager"' in str(caught.value)
        assert 'fallback="native"' in str(caught.value)
        assert {site.fallbacks for site in handle.sites} == {0}
    before.check()


def test_probabilities_come_from_eager(led):
    with torch.no_grad():
        native = led.model(**led.inputs, output_attentions=True)
        with attnzoo.patch(led.model, "eager"):
            patched = led.model(**led.inputs, output_attentions=True)
    for field in ("decoder_attentions", "cross_attentions", "encoder_attentions", "encoder_global_attentions"):
        assert len(patched[field]) == len(native[field]) > 0
        for got, expected in zip(patched[field], native[field], strict=True):
            if field == "encoder_global_attentions":  # (batch, heads, length, globals); sample 0 has one
                got, expected = got[..., :1], expected[..., :1]
            assert torch.allclose(got[0], expected[0], atol=1e-5), field  # sample 0 has no padding


def test_fallback_native_runs_the_original_and_counts_it(led):
    with torch.no_grad():
        native = led.model(**led.inputs, output_attentions=True)
        with attnzoo.patch(led.model, "sdpa", fallback="native") as handle:
            patched = led.model(**led.inputs, output_attentions=True)
            assert {(site.calls, site.fallbacks, site.kernel) for site in handle.sites} == {(0, 1, None)}
            led.logits()
            assert {site.fallbacks for site in handle.sites} == {1}
            assert sum(calls(handle).values()) == led.attentions
    assert torch.equal(patched.logits, native.logits)
    for field in ("decoder_attentions", "cross_attentions", "encoder_attentions", "encoder_global_attentions"):
        assert all(map(torch.equal, patched[field], native[field])), field


def test_fallback_over_another_patch_is_the_models_own_code(led):
    with torch.no_grad():
        native = led.model(**led.inputs, output_attentions=True).logits
        with attnzoo.patch(led.model, "eager") as below, attnzoo.patch(led.model, "sdpa", fallback="native"):
            assert torch.equal(led.model(**led.inputs, output_attentions=True).logits, native)
    assert set(calls(below).values()) == {0}, "native was asked for and eager ran"


def test_fallback_where_the_original_has_no_probabilities_either_still_refuses(neox):
    assert neox.model.config._attn_implementation == "sdpa"
    with (
        attnzoo.patch(neox.model, "sdpa", fallback="native"),
        pytest.raises(BackendRefusedError, match="attention probabilities"),
    ):
        neox.logits(output_attentions=True)


def test_fallback_takes_what_is_refused_at_patch_time(led, add_backend):
    native = led.logits()
    fake = add_backend("one-segment", segments=1)
    with attnzoo.patch(led.model, "one-segment", fallback="native") as handle:
        assert led.close(led.logits(), native)
    assert [(site.calls, site.fallbacks) for site in handle.sites] == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert fake.runs == 2


def holes(neox):
    """A mask that is more than causality and padding: nobody sees the third key but itself."""
    length = neox.inputs["input_ids"].shape[1]
    grid = torch.ones(length, length, dtype=torch.bool).tril()
    grid[3:, 2] = False
    return dict(attention_mask=grid.expand(3, 1, -1, -1))


def test_fallback_takes_what_only_the_inputs_tell(neox, add_backend):
    """Whether a dense mask comes along is known only in the forward; whatever refuses it there must fall back too."""
    native = neox.logits(**holes(neox))
    add_backend("maskless", mask=False)
    with attnzoo.patch(neox.model, "maskless", fallback="native") as handle:
        assert torch.equal(neox.logits(**holes(neox)), native)
    assert {(site.calls, site.fallbacks) for site in handle.sites} == {(0, 1)}


def test_fallback_takes_gradients_asked_for_in_eval_mode(subject, add_backend):
    native = subject.model(**subject.inputs).logits
    add_backend("forward-only", grad=False)
    with attnzoo.patch(subject.model, "forward-only", fallback="native") as handle:
        logits = subject.model(**subject.inputs).logits
        assert logits.requires_grad
        assert torch.equal(logits, native)
    assert {(site.calls, site.fallbacks) for site in handle.sites} == {(0, 1)}


def test_a_mask_a_backend_cannot_take_is_refused_not_dropped(neox, add_backend):
    fake = add_backend("maskless", mask=False)
    with attnzoo.patch(neox.model, "maskless") as handle:
        with pytest.raises(BackendRefusedError, match="mask: got requested; allowed: no dense mask"):
            neox.logits(**holes(neox))
        assert (fake.runs, set(calls(handle).values())) == (0, {0})
        neox.logits()  # padding and causality are no dense mask, however the model writes them down
        assert set(calls(handle).values()) == {1}


# Stacking and removal


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
    if subject.kind == "led":  # so that it shows which of the two ran
        assert not torch.equal(under_eager, under_sdpa)
    assert sum(calls(first).values()) == 2 * subject.attentions
    assert sum(calls(second).values()) == subject.attentions


def test_removing_out_of_order_raises_and_changes_nothing(subject):
    first, second = attnzoo.patch(subject.model, "sdpa"), attnzoo.patch(subject.model, "eager")
    top = subject.logits()
    with pytest.raises(PatchError, match=f"{subject.sites[0]}: .*later one on top.*last in, first out"):
        first.remove()
    assert first.active
    assert second.active
    assert torch.equal(subject.logits(), top)
    second.remove()
    first.remove()
    assert not first.active
    assert not second.active


def test_a_partly_covered_patch_is_not_removed_in_part(led):
    below = attnzoo.patch(led.model, "sdpa")
    above = attnzoo.patch(led.model, {led.sites[-1]: "eager"})
    top = led.logits()
    with pytest.raises(PatchError, match=led.sites[-1]):
        below.remove()
    assert all("forward" in vars(led.module(number)) for number in range(len(led.sites)))
    assert torch.equal(led.logits(), top)
    above.remove()
    below.remove()


def test_patches_on_different_modules_come_off_in_any_order(led):
    native = led.logits()
    encoder, decoder = attnzoo.patch(led.model, {"*encoder.l*": "sdpa"}), attnzoo.patch(led.model.led.decoder, "eager")
    encoder.remove()
    led.logits()
    assert (sum(calls(encoder).values()), sum(calls(decoder).values())) == (0, 2)
    decoder.remove()
    assert torch.equal(led.logits(), native)


def test_removing_twice_raises(subject, as_it_was):
    before = as_it_was(subject)
    handle = attnzoo.patch(subject.model, "sdpa")
    handle.remove()
    with pytest.raises(PatchError, match=r"allowed: removing a patch once"):
        handle.remove()
    before.check()


def test_a_context_manager_removes_its_patch_also_on_exceptions(subject, as_it_was):
    before = as_it_was(subject)
    with (
        pytest.raises(KeyError, match="in the middle"),
        attnzoo.patch(subject.model, "sdpa") as outer,
        attnzoo.patch(subject.model, "eager") as inner,
    ):
        assert outer.active
        assert inner.active
        raise KeyError("in the middle")
    assert not outer.active
    assert not inner.active
    before.check()


def test_an_exception_inside_a_forward_does_not_disturb_the_patch(neox, monkeypatch):
    native, run = neox.logits(), SdpaBackend.run
    with attnzoo.patch(neox.model, "sdpa") as handle:
        monkeypatch.setattr(SdpaBackend, "run", lambda *a, **k: (_ for _ in ()).throw(MemoryError("out of memory")))
        with pytest.raises(MemoryError):
            neox.logits()
        assert set(calls(handle).values()) == {0}, "what did not run is not counted"
        monkeypatch.setattr(SdpaBackend, "run", run)
        assert neox.close(neox.logits(), native)
    assert torch.equal(neox.logits(), native)


def test_unpatch_removes_the_last_patch(subject, as_it_was):
    before = as_it_was(subject)
    attnzoo.patch(subject.model, "sdpa")
    under_sdpa = subject.logits()
    attnzoo.patch(subject.model, "eager")
    attnzoo.unpatch(subject.model)
    assert torch.equal(subject.logits(), under_sdpa)
    attnzoo.unpatch(subject.model)
    before.check()
    with pytest.raises(PatchError, match="which is not patched; allowed: a patched model"):
        attnzoo.unpatch(subject.model)
    before.check()


def test_unpatch_after_the_handle_and_the_handle_after_unpatch(subject):
    handle = attnzoo.patch(subject.model, "sdpa")
    attnzoo.unpatch(subject.model)
    assert not handle.active
    with pytest.raises(PatchError):
        handle.remove()


# What people see


def test_a_handle_prints_as_a_table(led):
    with attnzoo.patch(led.model, "eager") as handle:
        led.logits()
    header, *rows = str(handle).splitlines()
    assert header.split() == ["site", "class", "pattern", "backend", "kernel", "calls", "fallbacks"]
    assert [row.split()[0] for row in rows] == list(led.sites)
    starts = [header.index(column) for column in ("class", "backend", "kernel", "calls", "fallbacks")]
    for row, site in zip(rows, handle.sites, strict=True):
        assert row[starts[0] :].startswith(site.cls)
        assert row[starts[1] :].split() == ["eager", "eager", str(site.calls), "0"]
        assert all(row[start - 1] == " " and row[start] != " " for start in starts), "columns line up"


def test_a_table_before_the_first_call_shows_that_nothing_ran(neox):
    with attnzoo.patch(neox.model, "sdpa") as handle:
        assert str(handle).splitlines()[1].split()[-4:] == ["sdpa", "-", "0", "0"]


# Copies


def test_a_deep_copy_computes_the_same_and_comes_off_on_its_own(subject):
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
    assert torch.equal(subject.logits(), patched), "the copy has weights of its own"
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


def test_pickling_a_patched_model_raises_and_says_what_to_do(subject):
    native = subject.logits()
    with attnzoo.patch(subject.model, "sdpa") as handle:
        for save in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
            with pytest.raises(PatchError, match=r"cannot be pickled; allowed: model\.save_pretrained.*unpatch"):
                save(subject.model)
        assert handle.active
    assert torch.equal(subject.logits(pickle.loads(pickle.dumps(subject.model))), native)


# The functional call


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_the_functional_call(backend):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(attnzoo.attention(q, k, v, attnzoo.Causal(), backend=backend), expected, atol=1e-5)
    even = attnzoo.attention(q, k, v, scale=0.0, backend=backend)
    assert torch.allclose(even[:, 0, 0], v[:, 0].mean(1), atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_the_functional_call_with_masks_globals_and_bias(backend):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    key_mask, global_keys, query_mask = (torch.ones(2, 10, dtype=torch.bool) for _ in range(3))
    key_mask[0, 7:] = query_mask[1, :2] = False
    global_keys[:] = False
    global_keys[0, 1] = global_keys[1, 8] = True
    i, j = torch.arange(10)[:, None], torch.arange(10)
    seen = (((j - i).abs() <= 2)[None] | global_keys[:, None]) & key_mask[:, None]
    scores = (q @ k.mT / 2).masked_fill(~seen[:, None], float("-inf"))
    expected = (scores.softmax(-1) @ v).nan_to_num() * query_mask[:, None, :, None]  # rows that see nothing are zero
    more = dict(key_mask=key_mask, query_mask=query_mask, backend=backend)
    got = attnzoo.attention(q, k, v, attnzoo.Window(2, 2), global_keys=global_keys, **more)
    assert torch.allclose(got, expected, atol=1e-5)

    bias = torch.randn(1, 3, 10, 10)
    expected = ((q @ k.mT / 2 + bias).masked_fill(~key_mask[:, None, None], float("-inf"))).softmax(-1) @ v
    got = attnzoo.attention(q, k, v, bias=bias, key_mask=key_mask, backend=backend)
    assert torch.allclose(got, expected, atol=1e-5)


def test_functional_dropout_drops_weights_whole():
    torch.manual_seed(2)
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 64, 4)
    v = torch.eye(64)[None, None]
    weights = attnzoo.attention(q, k, v, dropout=0.5) * 64 * 0.5  # kept weights are scaled by 1 / (1 - p)
    assert torch.all((weights - weights.round()).abs() < 1e-5)
    assert 10 < int(weights.sum().round()) < 54


def test_what_is_remembered_of_a_mask_dies_with_it(neox):
    """A bool mask is its own reading: remembering it would keep every forward's mask for as long as the patch lasts."""
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0
    with attnzoo.patch(neox.model, "sdpa") as handle, torch.no_grad():
        for _ in range(3):
            neox.model(input_ids=torch.full((3, 11), 5), attention_mask=mask)
        gc.collect()
        assert not any(len(forward._attend._memory) for forward in handle.forwards)
