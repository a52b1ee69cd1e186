"""Some calls run the model's code and others a backend, in any mixture: outputs, gradients and tokens stay the same."""

import random

import pytest
import torch

import attnzoo
from attnzoo.auto.native import NativeChooser
from attnzoo.auto.selection import AutoBackend
from attnzoo.verification.model_runs import run_model
from tests.support.compare import is_close
from tests.support.models import FAMILIES

NATIVE, OURS = AutoBackend(native="always"), AutoBackend(native="never")
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)


def alternating(model, first):
    """Return a mapping in which every other site of a model runs the model's code, beginning with ``first``."""
    with attnzoo.patch(model) as handle:
        names = [site.name for site in handle.sites]
    backends = (NATIVE, OURS) if first == "native" else (OURS, NATIVE)
    return {name: backends[number % 2] for number, name in enumerate(names)}


@pytest.fixture
def by_coin(monkeypatch):
    """Return a function that seeds a coin. The coin decides for every call of every site."""
    coin, choose = random.Random(), NativeChooser.choose

    def toss(self, *call):
        return choose(self, *call) if coin.random() < 0.5 else None

    monkeypatch.setattr(NativeChooser, "choose", toss)
    return coin.seed


def build(family):
    """Return a model. A model whose original code is coarse in float32 is in float64."""
    model = family.build()
    return model.double() if family.coarse else model


def results(family, model, side):
    """Return outputs on real tokens and the gradient of all parameters. Reformer's backward needs training mode."""
    model.train(family.name == "reformer")
    return run_model(model, family.inputs(24, side), True, seed=0, inference=True)


def assert_same(got, expected):
    assert got.keys() == expected.keys() and "gradient of all parameters" in got
    for what, value in expected.items():
        assert is_close(got[what], value), what


def kernels(handle):
    return {kernel == "native" for site in handle.sites for kernel in site.kernels}


@families
@pytest.mark.parametrize("side", ["none", "right"])
def test_sites_alternate(family, side):
    model = build(family)
    expected = results(family, model, side)
    for first in ("native", "ours"):
        with attnzoo.patch(model, alternating(model, first)) as handle:
            assert_same(results(family, model, side), expected)
        assert kernels(handle) == {True, False}


@families
def test_each_call_decides_by_a_coin(family, by_coin):
    model = build(family)
    expected = results(family, model, "none")
    for seed in range(4):
        by_coin(seed)
        with attnzoo.patch(model, NATIVE) as handle:
            assert_same(results(family, model, "none"), expected)
        assert kernels(handle) == {True, False}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.prompt is not None], ids=str)
def test_each_decoding_step_decides_by_a_coin(family, cache, by_coin):
    if cache == "static" and not family.static_cache:
        pytest.skip("the model has no static cache")
    model = family.build()
    side = "left" if family.name.startswith(("gpt", "led")) else "none"
    options = dict(**family.prompt(side), do_sample=False, max_new_tokens=8, no_repeat_ngram_size=2)
    options |= dict(cache_implementation="static") if cache == "static" else {}
    before = model.generate(**options)
    for seed in range(2):
        by_coin(seed)
        with attnzoo.patch(model, NATIVE) as handle:
            assert torch.equal(model.generate(**options), before)
        assert kernels(handle) == {True, False}


def test_a_patched_layer_passes_its_bias_to_layers_that_may_run_the_models_code():
    """Such a layer gets one bias value per distance, which the original cannot read. So the layer runs a backend."""
    family = FAMILIES["longt5-local"]
    model = family.build()
    names = [name for name in alternating(model, "ours") if "SelfAttention" in name]
    first = {name: OURS for name in names if ".block.0." in name}
    with attnzoo.patch(model, {**first, "*": NATIVE}) as handle, torch.no_grad():
        model(**family.inputs(24, "none"))
    ran = {site.name: site.kernel for site in handle.sites}
    assert all("native" not in ran[name] for name in names), ran
    assert all(kernel == "native" for name, kernel in ran.items() if name not in names)
    last = {name: OURS for name in names if ".block.1." in name}
    with attnzoo.patch(model, {**last, "*": NATIVE}) as handle, torch.no_grad():
        model(**family.inputs(24, "none"))
    assert {site.name: site.kernel == "native" for site in handle.sites} == {name: name not in last for name in ran}


def test_the_models_code_fits_the_mask_of_one_row():
    """LED's encoder builds a mask of one row as soon as a site inside may run a backend. All layers read this row."""
    family = FAMILIES["led"]
    model, inputs = family.build(), family.inputs(24, "left")
    with torch.no_grad():
        expected = model(**inputs).encoder_last_hidden_state
        with attnzoo.patch(model, NATIVE) as handle:
            got = model(**inputs).encoder_last_hidden_state
    companions = {forward.point.describe(None) for forward in handle.forwards if not forward.point.attends}
    assert "makes a padding mask of one row" in companions
    assert torch.equal(got, expected)
