"""`install`, `uninstall` and `installed`: what they change in transformers, for whom, and the exact undo."""

import threading

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import attnzoo
from attnzoo.installing.hooks import _DECISION
from tests.installing.conftest import transformers_state
from tests.support.checkpoints import load
from tests.support.installed import backends_of, logits, ran

WRAPPED = {_DECISION, "post_init", "from_pretrained", "set_attn_implementation"}


def changed():
    return {name for name, value in vars(PreTrainedModel).items() if value is not UNCHANGED.get(name)}


UNCHANGED = dict(vars(PreTrainedModel))


def test_install_wraps_four_methods_and_uninstall_restores_them():
    before = transformers_state()
    attnzoo.install()
    assert changed() == WRAPPED
    assert PreTrainedModel.from_pretrained.__doc__ == UNCHANGED["from_pretrained"].__doc__
    attnzoo.uninstall()
    assert changed() == set()
    assert transformers_state() == before
    assert list(vars(PreTrainedModel)) == list(UNCHANGED)


def test_install_may_be_repeated_and_undone_once():
    attnzoo.install("sdpa")
    attnzoo.install("eager")
    assert backends_of(load("led")) == {"eager"}
    attnzoo.install()
    assert not attnzoo.is_patched(load("led"))
    attnzoo.uninstall()
    assert changed() == set()
    attnzoo.uninstall()


def test_models_stay_patched_after_uninstall():
    with attnzoo.installed():
        model = load("led", attn_implementation="sdpa")
    assert changed() == set()
    assert ran("led", model)
    attnzoo.unpatch(model)
    assert torch.equal(logits("led", model), logits("led", load("led")))


def test_installed_blocks_nest():
    with attnzoo.installed("sdpa"):
        with attnzoo.installed("eager"):
            assert backends_of(load("led")) == {"eager"}
        with attnzoo.installed():
            assert not attnzoo.is_patched(load("led"))
        assert backends_of(load("led")) == {"sdpa"}
    assert changed() == set()


def test_an_error_ends_a_block():
    with pytest.raises(KeyError), attnzoo.installed("sdpa"):
        raise KeyError
    assert changed() == set()
    assert not attnzoo.is_patched(load("led"))


def test_uninstall_does_not_end_an_open_block():
    attnzoo.install("eager")
    with attnzoo.installed("sdpa"):
        attnzoo.uninstall()
        assert backends_of(load("led")) == {"sdpa"}
    assert changed() == set()


def test_install_inside_a_block_outlives_the_block():
    with attnzoo.installed():
        attnzoo.install("sdpa")
        assert not attnzoo.is_patched(load("led"))
    assert backends_of(load("led")) == {"sdpa"}


@pytest.mark.parametrize("install", [attnzoo.install, lambda default: attnzoo.installed(default).__enter__()])
@pytest.mark.parametrize(
    ("default", "error", "match"),
    [
        ("spda", attnzoo.UnknownNameError, r"default: got 'spda' \(did you mean 'sdpa'\?\)"),
        ("blocked-local:window=x", attnzoo.InvalidArgumentError, "window of backend 'blocked-local': got 'x'"),
        (3, attnzoo.InvalidArgumentError, "default: got 3; allowed: the name of a backend"),
        pytest.param(
            "flash",
            attnzoo.BackendRefusedError,
            r"default:\n.*availability: got(.|\n)*backends that support it: 'sdpa'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the backend may run with CUDA"),
        ),
    ],
)
def test_a_wrong_default_is_refused_at_once(install, default, error, match):
    with pytest.raises(error, match=match):
        install(default)
    assert changed() == set()


def test_the_environment_names_the_default(monkeypatch):
    monkeypatch.setenv("ATTNZOO_BACKEND", "sdpa")
    attnzoo.install()
    assert backends_of(load("led")) == {"sdpa"}
    attnzoo.install(default="eager")
    assert backends_of(load("led")) == {"eager"}
    monkeypatch.setenv("ATTNZOO_BACKEND", "")
    attnzoo.install()
    assert not attnzoo.is_patched(load("led"))
    monkeypatch.setenv("ATTNZOO_BACKEND", "spda")
    with pytest.raises(attnzoo.UnknownNameError, match="ATTNZOO_BACKEND: got 'spda'"):
        attnzoo.install()


def test_a_transformers_that_decides_in_another_way_is_refused(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, _DECISION, lambda self, attention, strict=False: "eager")
    with pytest.raises(
        attnzoo.PatchError, match=r"install: got transformers .* parameters \['self', 'attention', 'str"
    ):
        attnzoo.install()
    monkeypatch.undo()
    for uses in (
        lambda self: self._check_and_adjust_attn_implementation,
        lambda self: self._attn_implementation_internal,
    ):
        monkeypatch.setattr(PreTrainedModel, "__init__", uses)
        with pytest.raises(attnzoo.PatchError, match="or is not used by __init__"):
            attnzoo.install()
        monkeypatch.undo()
    assert changed() == set()


def test_a_replaced_wrapper_is_not_lost(monkeypatch):
    attnzoo.install()
    wrapper = PreTrainedModel.set_attn_implementation
    PreTrainedModel.set_attn_implementation = lambda *args, **kwargs: wrapper(*args, **kwargs)
    with pytest.raises(attnzoo.PatchError, match="set_attn_implementation, which other code has"):
        attnzoo.uninstall()
    assert backends_of(load("led", attn_implementation="sdpa")) == {"sdpa"}
    PreTrainedModel.set_attn_implementation = wrapper
    attnzoo.uninstall()
    assert changed() == set()


# Threads

_loading = threading.Lock()


def load_alone(*args, **options):
    """Load while no other thread loads: transformers leaves parameters without data if two threads load at once."""
    with _loading:
        return load(*args, **options)


def in_threads(*functions):
    """Run functions in threads that start together; return their results."""
    barrier, results = threading.Barrier(len(functions)), [None] * len(functions)

    def call(number, function):
        barrier.wait()
        try:
            results[number] = function()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_block_is_for_its_thread_only():
    with attnzoo.installed("sdpa"):
        plain, foreign = in_threads(lambda: load_alone("led"), lambda: load_alone("led", attn_implementation="sdpa"))
        assert not attnzoo.is_patched(plain)
        assert "does not support an attention implementation through" in str(foreign)
        assert backends_of(load_alone("led")) == {"sdpa"}


def test_an_installed_model_can_be_switched_from_any_thread():
    with attnzoo.installed():
        model = load_alone("led", attn_implementation="sdpa")
        assert in_threads(lambda: model.set_attn_implementation("eager")) == [None]
        assert not attnzoo.is_patched(model)


def test_install_is_for_all_threads():
    attnzoo.install("sdpa")
    models = in_threads(lambda: load_alone("led"), lambda: load_alone("gpt_neox"))
    assert [backends_of(model) for model in models] == [{"sdpa"}, {"sdpa"}]


def test_blocks_of_two_threads_end_in_any_order():
    entered, left = threading.Event(), threading.Event()

    def first():
        with attnzoo.installed("sdpa"):
            entered.set()
            left.wait(60)
            return backends_of(load_alone("led"))

    def second():
        entered.wait(60)
        with attnzoo.installed("eager"):
            backends = backends_of(load_alone("led"))
        left.set()
        return backends

    assert in_threads(first, second) == [{"sdpa"}, {"eager"}]
    assert changed() == set()


def test_a_mixed_program_stays_independent():
    """One model patched, one installed, one plain, in two threads."""
    expected = {"plain": logits("led", load_alone("led"))}
    for name in ("sdpa", "eager"):
        model = load_alone("led")
        attnzoo.patch(model, name)
        expected[name] = logits("led", model)

    def installed():
        for _ in range(3):
            with attnzoo.installed():
                model = load_alone("led", attn_implementation="sdpa")
            assert torch.equal(logits("led", model), expected["sdpa"])
            assert {site.calls for site in attnzoo.handle(model).sites} == {1, 2}

    def others():
        for _ in range(3):
            plain, patched = load_alone("led"), load_alone("led")
            with attnzoo.patch(patched, "eager") as handle:
                assert torch.equal(logits("led", patched), expected["eager"])
                assert torch.equal(logits("led", plain), expected["plain"])
                assert {site.kernel for site in handle.sites} == {"eager"}
            assert torch.equal(logits("led", patched), expected["plain"])
            assert not attnzoo.is_patched(plain)

    assert in_threads(installed, others) == [None, None]
    assert changed() == set()


def test_transformers_methods_are_those_that_were_read():
    assert transformers.PreTrainedModel is PreTrainedModel
    assert set(UNCHANGED) >= WRAPPED
