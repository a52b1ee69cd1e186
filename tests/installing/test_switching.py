"""`model.set_attn_implementation(NAME)`."""

import copy

import pytest
import torch

import attnzoo
from tests.support.checkpoints import load
from tests.support.installed import FAMILIES, backends_of, logits, ran


@pytest.fixture(autouse=True)
def install():
    attnzoo.install()


def state(model):
    """The forwards and configurations of a model."""
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return forwards, [(vars(config).copy(), type(config._attn_implementation)) for config in configs.values()]


@pytest.mark.parametrize("family", ["led", "longt5", "reformer"])
def test_sdpa_is_switched_on_and_eager_back_on(family):
    model = load(family)
    before, outputs = state(model), logits(family, model)
    model.set_attn_implementation("sdpa")
    assert backends_of(model) == {"sdpa"}
    assert "eager" not in ran(family, model)
    model.set_attn_implementation("eager")
    assert state(model) == before
    assert torch.equal(logits(family, model), outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_backend_replaces_another(family):
    model = load(family, attn_implementation="attnzoo/sdpa")
    first = attnzoo.handle(model)
    model.set_attn_implementation("attnzoo/eager")
    assert not first.active
    assert ran(family, model) == {"eager"}
    assert model.config.attnzoo_backend == "eager"
    attnzoo.unpatch(model)
    assert not attnzoo.is_patched(model)


def test_names_of_transformers_reach_transformers():
    model = load("gpt_neox", attn_implementation="attnzoo/sdpa")
    model.set_attn_implementation("flex_attention")
    assert not attnzoo.is_patched(model)
    assert (type(model.config._attn_implementation), model.config._attn_implementation) == (str, "flex_attention")
    model.set_attn_implementation("attnzoo/sdpa")
    assert model.config._attn_implementation in ("eager", "sdpa")
    assert ran("gpt_neox", model)
    model.set_attn_implementation("sdpa")
    assert not attnzoo.is_patched(model) and type(model.config._attn_implementation) is str


@pytest.mark.parametrize("field", ["eager", "sdpa"])
def test_a_field_that_suits_the_adapters_is_kept(field):
    """The model reads the field to select the format of its mask."""
    model = load("gpt_neox", attn_implementation=field)
    model.set_attn_implementation("attnzoo/sdpa")
    assert model.config._attn_implementation == field
    assert ran("gpt_neox", model)


@pytest.mark.parametrize("family", ["led", "gpt_neox"])
def test_a_name_of_transformers_ends_the_request_of_an_unpatched_model(family):
    """After `attnzoo.unpatch`, the configuration still stores the name. Setting a name of transformers removes it."""
    model = load(family, attn_implementation="attnzoo/sdpa")
    attnzoo.unpatch(model)
    assert model.config.attnzoo_backend == "sdpa"
    with attnzoo.patch(model, "native"):
        model.set_attn_implementation("eager")
        assert backends_of(model) == {"native"}
    assert not hasattr(model.config, "attnzoo_backend")
    assert not attnzoo.is_patched(type(model)(model.config))


@pytest.mark.parametrize("start", ["eager", "attnzoo/sdpa"])
@pytest.mark.parametrize("name", ["flash", "attnzoo/spda", "spda", "lsh:window=2", "something-else"])
@pytest.mark.parametrize("family", ["led", "longt5"])
def test_a_refusal_changes_nothing(family, start, name):
    model = load(family, attn_implementation=start)
    before = state(model)
    with pytest.raises((attnzoo.AttnzooError, ValueError)):  # without install, LED only logs a warning
        model.set_attn_implementation(name)
    assert state(model) == before


def test_a_call_that_a_loaded_model_refuses_is_refused_now(add_backend):
    """Unlike a model under construction, a loaded model has its mode and device."""
    add_backend("forward-only", grad=False)
    model = load("led")
    with pytest.raises(attnzoo.BackendRefusedError, match="grad"):
        model.train().set_attn_implementation("forward-only")
    model.eval().set_attn_implementation("forward-only")


def test_a_patch_of_the_user_is_not_touched():
    model = load("led", attn_implementation="sdpa")
    with attnzoo.patch(model, "eager") as handle:
        before = state(model)
        for name in ("attnzoo/sdpa", "eager"):
            with pytest.raises(attnzoo.PatchError, match=r"got a model with a patch of attnzoo.patch at .*unpatch"):
                model.set_attn_implementation(name)
            assert state(model) == before and handle.active
    model.set_attn_implementation("eager")
    assert not attnzoo.is_patched(model)


def test_a_part_of_an_installed_model_is_refused():
    model = load("led", attn_implementation="sdpa")
    before = state(model)
    with pytest.raises(attnzoo.PatchError, match="the whole model that was patched, not a part of it"):
        model.get_encoder().set_attn_implementation("eager")
    assert state(model) == before


def test_a_copy_switches_alone():
    model = load("led", attn_implementation="sdpa")
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert not attnzoo.is_patched(twin) and backends_of(model) == {"sdpa"}
    twin.set_attn_implementation("attnzoo/eager")
    assert (backends_of(twin), backends_of(model)) == ({"eager"}, {"sdpa"})


def test_after_uninstall_a_model_keeps_its_patch():
    model = load("led", attn_implementation="sdpa")
    attnzoo.uninstall()
    assert ran("led", model)
    model.set_attn_implementation("eager")  # transformers' own method, which changes nothing on LED
    assert backends_of(model) == {"sdpa"}
    with attnzoo.installed():
        model.set_attn_implementation("eager")
    assert not attnzoo.is_patched(model)


def test_without_install_led_stays_eager():
    attnzoo.uninstall()
    model = load("led")
    model.set_attn_implementation("sdpa")
    assert not attnzoo.is_patched(model) and model.config._attn_implementation == "eager"
