"""A patch and accelerate's hooks work on the same module, in every order of adding and removing them."""

from __future__ import annotations

import pytest
import torch

import attnzoo
from tests.support.compare import is_close
from tests.support.models import FAMILIES
from tests.support.subject import REMOVALS

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")


class Counting(hooks.ModelHook):
    """Counts its calls and scales the output, so that a lost hook changes the count and the output."""

    def __init__(self, factor=1.0):
        self.before = self.after = 0
        self.factor = factor

    def pre_forward(self, module, *args, **kwargs):
        self.before += 1
        return args, kwargs

    def post_forward(self, module, output):
        self.after += 1
        if self.factor == 1.0:
            return output
        return (output[0] * self.factor, *output[1:])


def hook_up(subject, factor=1.0):
    """Add a hook to each attention module and to the whole model."""
    counting = [Counting(factor) for _ in subject.sites]
    for number, hook in enumerate(counting):
        hooks.add_hook_to_module(subject.module(number), hook)
    whole = Counting()
    hooks.add_hook_to_module(subject.model, whole)
    return [*counting, whole]


def unhook(subject):
    for number in range(len(subject.sites)):
        hooks.remove_hook_from_module(subject.module(number))
    hooks.remove_hook_from_module(subject.model)


def check_runs(subject, counting, handle, expected):
    """Run a forward. Every hook in place fires once, and every site of an active patch runs."""
    fired = [(hook.before, hook.after) for hook in counting]
    called = [] if handle is None else [site.calls for site in handle.sites]
    got = subject.logits()
    hooked = any("_hf_hook" in vars(module) for module in subject.model.modules())
    for hook, (before, after) in zip(counting, fired, strict=True):
        assert (hook.before - before, hook.after - after) == ((1, 1) if hooked else (0, 0))
    if handle is not None:
        calls = sum(site.calls for site in handle.sites) - sum(called)
        assert calls == (subject.attentions if handle.active else 0)
    assert subject.close(got, expected)
    return got


@pytest.mark.parametrize("last_off", ["patch", "hook"])
@pytest.mark.parametrize("first_on", ["patch", "hook"])
def test_patch_and_hook_run_in_every_order_and_the_original_is_restored(subject, first_on, last_off):
    native = subject.logits()
    counting = hook_up(subject) if first_on == "hook" else None
    handle = attnzoo.patch(subject.model, "sdpa")
    counting = counting or hook_up(subject)
    check_runs(subject, counting, handle, native)
    if last_off == "hook":
        handle.remove()
        assert torch.equal(check_runs(subject, counting, handle, native), native)
        unhook(subject)
    else:
        unhook(subject)
        check_runs(subject, counting, handle, native)
        handle.remove()
    assert torch.equal(check_runs(subject, counting, handle, native), native)
    assert not handle.active
    for name, module in subject.model.named_modules():
        assert not {"_hf_hook", "_old_forward"} & set(vars(module)), name
        # accelerate itself leaves the class's own forward in the instance when a hook goes last
        assert getattr(module.forward, "__func__", None) is type(module).forward, name


def test_a_hook_keeps_its_effect_under_a_patch(led):
    hook_up(led, factor=0.5)
    halved = led.logits()
    with attnzoo.patch(led.model, "sdpa"):
        assert led.close(led.logits(), halved)
    assert torch.equal(led.logits(), halved)
    unhook(led)
    assert not led.close(led.logits(), halved)


def test_hooks_run_between_stacked_patches(subject):
    native = subject.logits()
    below = attnzoo.patch(subject.model, "sdpa")
    counting = hook_up(subject)
    above = attnzoo.patch(subject.model, "eager")
    check_runs(subject, counting, above, native)
    assert sum(site.calls for site in below.sites) == 0
    with pytest.raises(attnzoo.PatchError, match="last in, first out"):
        below.remove()
    above.remove()
    check_runs(subject, counting, below, native)
    unhook(subject)
    below.remove()
    assert torch.equal(check_runs(subject, counting, below, native), native)


def test_a_hook_can_be_appended_while_patched(neox):
    native, first, second = neox.logits(), Counting(), Counting()
    hooks.add_hook_to_module(neox.module(), first)
    with attnzoo.patch(neox.model, "sdpa") as handle:
        hooks.add_hook_to_module(neox.module(), second, append=True)
        neox.logits()
        assert (first.after, second.after, handle.sites[0].calls) == (1, 1, 1)
    assert torch.equal(neox.logits(), native)
    assert (first.after, second.after, handle.sites[0].calls) == (2, 2, 1)


def test_unpatch_removes_a_patch_behind_a_hook(subject):
    native = subject.logits()
    counting = hook_up(subject)
    attnzoo.patch(subject.model, "sdpa")
    attnzoo.unpatch(subject.model)
    assert torch.equal(check_runs(subject, counting, None, native), native)
    with pytest.raises(attnzoo.PatchError, match="not patched"):
        attnzoo.unpatch(subject.model)


def test_a_patch_runs_behind_an_align_devices_hook(subject):
    native = subject.logits()
    for number in range(len(subject.sites)):
        hooks.add_hook_to_module(subject.module(number), hooks.AlignDevicesHook("cpu", io_same_device=True))
    with attnzoo.patch(subject.model, "sdpa") as handle:
        assert subject.close(subject.logits(), native)
        assert all(site.calls for site in handle.sites)
    assert torch.equal(subject.logits(), native)


# Offloaded weights


def offload(model, **more):
    accelerate.cpu_offload(model, execution_device="cpu", **more)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("first_on", ["patch", "hook"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_model_with_offloaded_weights_is_patched(family, first_on):
    model, inputs = family.build(), family.inputs(21, "none")
    with torch.no_grad(), attnzoo.patch(model, "sdpa"):
        expected = model(**inputs).logits
    if first_on == "hook":
        offload(model)
    handle = attnzoo.patch(model, "sdpa")
    if first_on == "patch":
        offload(model)
    with torch.no_grad():
        got = model(**inputs).logits
    assert is_close(got, expected)
    assert all(site.calls for site in handle.sites)
    assert all(verdict.runs for verdict in attnzoo.explain(model, "sdpa"))
    assert attnzoo.verify(model, inputs, "eager", gradients=False).ok


def test_offloaded_whole_modules_behind_other_hooks_are_patched(neox):
    native = neox.logits()
    offload(neox.model, preload_module_classes=["GPTNeoXAttention"])
    hooks.add_hook_to_module(neox.module(1), Counting(), append=True)
    with attnzoo.patch(neox.model, "sdpa"):
        assert neox.close(neox.logits(), native)


def test_verify_refuses_gradients_of_offloaded_weights(neox):
    offload(neox.model)
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"gradients: got True for offloaded .*; allowed: False"):
        attnzoo.verify(neox.model, neox.inputs)


# Forwards that something else replaces


def leave_the_context(handle, model):
    with handle:
        pass


@pytest.mark.parametrize("remove", [*REMOVALS.values(), leave_the_context], ids=[*REMOVALS, "context"])
def test_removing_raises_and_changes_nothing_if_something_replaced_the_patched_forward(subject, remove):
    handle = attnzoo.patch(subject.model, "sdpa")
    module, name = subject.module(1), subject.sites[1]
    patched, seen = module.forward, []

    def replacement(*args, **kwargs):
        seen.append(name)
        return patched(*args, **kwargs)

    module.forward = replacement
    subject.logits()
    with pytest.raises(attnzoo.PatchError, match=f"{name}.*(other code|nothing else) has replaced"):
        remove(handle, subject.model)
    assert module.forward is replacement
    assert all("forward" in vars(subject.module(number)) for number in range(len(subject.sites)))
    subject.logits()
    assert seen == [name, name]
    assert all(site.calls for site in handle.sites)
    module.forward = patched
    handle.remove()
    assert not handle.active


def test_patch_does_not_bypass_a_replaced_forward_silently(subject):
    """If other code has replaced a forward, ``patch`` raises, or the replaced forward runs."""
    module, original, seen = subject.module(), subject.module().forward, []

    def replacement(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    module.forward = replacement
    try:
        handle = attnzoo.patch(subject.model, "sdpa")
    except attnzoo.PatchError as error:
        assert subject.sites[0] in str(error)
        assert module.forward is replacement
        return
    subject.logits()
    assert seen, "the replacement is bypassed"
    handle.remove()
    assert module.forward is replacement
