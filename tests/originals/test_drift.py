"""An adapter refuses code it was not verified against, and says what changed it."""

from __future__ import annotations

import functools
import linecache
import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

import attnzoo
from attnzoo.originals import drift as drift_module
from attnzoo.originals.drift import Difference, drift_message, find_drift
from attnzoo.originals.fingerprint import fingerprint, object_at, path_of
from attnzoo.registry import registry
from tests.support.models import gpt_neox

WHERE = "transformers.models.gpt_neox.modeling_gpt_neox"
FORWARD = f"{WHERE}:GPTNeoXAttention.forward"


def differences(path, *known):
    return [(difference.path, difference.cause, difference.detail) for difference in find_drift({path: known})]


def test_drift_reports_missing_and_changed_functions():
    known = fingerprint(modeling_gpt_neox.GPTNeoXAttention.forward)
    assert differences(FORWARD, "other", known) == []
    changed = f"got fingerprint {known}; allowed: 0123456789abcdef, other"
    assert differences(FORWARD, "0123456789abcdef", "other") == [(FORWARD, "changed", changed)]
    for path, error in [
        (f"{WHERE}:GPTNeoXAttention.backward_", "AttributeError"),
        (f"{WHERE}:GPTNeoYAttention.forward", "AttributeError"),
        ("transformers.models.gpt_neoy:X.forward", "ModuleNotFoundError"),
    ]:
        [(where, cause, detail)] = differences(path, known)
        assert (where, cause) == (path, "changed") and detail.startswith(error)


def refusal(model):
    """Return the message with which ``patch`` refuses a model. The model is unchanged."""
    with pytest.raises(attnzoo.DriftError) as caught:
        attnzoo.patch(model, "sdpa")
    assert all("forward" not in vars(module) for module in model.modules())
    refused = [reason.got for verdict in attnzoo.explain(model, "sdpa") for reason in verdict.refusals]
    assert str(caught.value) in refused
    assert len(str(caught.value)) < 400
    return str(caught.value)


def runs_natively(model):
    with attnzoo.patch(model, "native") as handle, torch.no_grad():
        model(torch.arange(4)[None])
    return handle


# Another version


def test_other_version_is_refused_with_the_verified_versions(monkeypatch):
    adapter = registry.find_adapter("gpt_neox")

    class OtherVersion(type(adapter.points[0])):
        verified = {FORWARD: ("0123456789abcdef",)}

    other = replace(adapter, points=(OtherVersion(),))
    monkeypatch.setattr(registry, "adapters", lambda: {"gpt_neox": other})
    model = gpt_neox()
    message = refusal(model)
    assert f"verified against transformers {adapter.versions}" in message
    assert f"installed is {transformers.__version__}" in message
    assert f"{FORWARD}: got fingerprint " in message and "allowed: 0123456789abcdef." in message
    assert "Use a verified version, or backend 'native'" in message
    runs_natively(model)


def test_changed_code_of_another_package_is_refused_without_versions_of_transformers():
    path = "tests.originals.test_drift:Callable_.__get__"

    class Point(attnzoo.PatchPoint):
        cls = "tests.originals.test_drift:Callable_"
        verified = {path: ("0123456789abcdef",)}

        def describe(self, module):
            return "full"

    adapter = attnzoo.Adapter(model_types=("mine",), points=(Point(),), versions="5.17")
    with pytest.raises(attnzoo.DriftError) as caught:
        adapter.check_drift(adapter.points[0])
    assert str(caught.value) == (
        f"the code of tests changed since the adapter for mine was verified: {path}: got fingerprint "
        f"{fingerprint(Callable_.__get__)}; allowed: 0123456789abcdef. Read it again, then record what "
        "'attnzoo fingerprint' prints, or use backend 'native'"
    )


def test_missing_forward_is_refused_as_another_version(monkeypatch):
    model = gpt_neox()
    monkeypatch.delattr(modeling_gpt_neox.GPTNeoXAttention, "forward")
    assert "was verified against transformers" in refusal(model)


# Replaced at run time


def replacement(original):
    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    return forward


def wrapper(original):
    return functools.wraps(original)(replacement(original))


class Callable_:
    def __init__(self, original):
        functools.update_wrapper(self, original)
        self.original = original

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self.original, instance)

    def __call__(self, *args, **kwargs):
        return self.original(*args, **kwargs)


def of_another_model(original):
    return modeling_llama.LlamaAttention.forward


def mocked(original):
    return mock.Mock(spec=["__call__"])


REPLACEMENTS = [
    (replacement, "replaced at run time by replacement.<locals>.forward of module tests.originals.test_drift, line"),
    (wrapper, "wrapped at run time by replacement.<locals>.forward of module tests.originals.test_drift, line "),
    (Callable_, "wrapped at run time by an object of type tests.originals.test_drift.Callable_;"),
    (functools.partial, "replaced at run time by an object of type functools.partial;"),
    (of_another_model, "replaced at run time by LlamaAttention.forward of module transformers.models.llama."),
    (mocked, "replaced at run time by an object of type unittest.mock.Mock;"),
]


@pytest.mark.parametrize(("make", "expected"), REPLACEMENTS, ids=[make.__name__ for make, _ in REPLACEMENTS])
def test_replacement_of_a_method_is_named(monkeypatch, make, expected):
    model, original = gpt_neox(), modeling_gpt_neox.GPTNeoXAttention.forward
    monkeypatch.setattr(modeling_gpt_neox.GPTNeoXAttention, "forward", make(original))
    message = refusal(model)
    if sys.version_info < (3, 11):  # code has only its short name
        expected = expected.replace("replacement.<locals>.", "").replace("LlamaAttention.", "")
    assert message.startswith(f"{FORWARD}: {expected}")
    assert "Restore this function, or use backend 'native'" in message
    assert "version" not in message
    if make in (replacement, wrapper):
        runs_natively(model)


@pytest.mark.parametrize("make", [replacement, wrapper])
def test_replacement_of_a_module_function_is_named(monkeypatch, make):
    where = "transformers.models.gpt_bigcode.modeling_gpt_bigcode:eager_attention_forward"
    adapter = registry.find_adapter("gpt_bigcode")
    point = next(point for point in adapter.points if where in point.verified)
    adapter.check_drift(point)
    monkeypatch.setattr(where.replace(":", "."), make(object_at(where)))
    with pytest.raises(attnzoo.DriftError, match=rf"{where}: (replaced|wrapped) at run time by \S*forward of module"):
        adapter.check_drift(point)


def test_wrapper_of_a_function_that_still_runs_is_allowed(monkeypatch):
    led = "transformers.models.led.modeling_led"
    adapter = registry.find_adapter("led")
    point = next(point for point in adapter.points if f"{led}:LEDEncoder.forward" in point.verified)
    encoder = object_at(f"{led}:LEDEncoder")
    monkeypatch.setattr(encoder, "forward", wrapper(encoder.forward))
    adapter.check_drift(point)
    monkeypatch.setattr(encoder, "forward", replacement(encoder.forward))
    with pytest.raises(attnzoo.DriftError, match=r"LEDEncoder\.forward: replaced at run time by"):
        adapter.check_drift(point)


# Source not available


def test_package_without_source_has_another_message(monkeypatch):
    model = gpt_neox()
    monkeypatch.setattr(linecache, "getlines", lambda *args: [])
    drift_module._fingerprint_at.cache_clear()
    message = refusal(model)
    assert message.startswith(
        f"{FORWARD}: the source of the function is not available (modeling_gpt_neox.py); the adapter for gpt_neox"
    )
    assert "Use the package with its .py files" in message and "version" not in message
    runs_natively(model)


def test_compiled_function_is_unreadable():
    assert [(path, cause) for path, cause, _ in differences("builtins:len", "0123")] == [("builtins:len", "unreadable")]


# Overridden by a subclass


class Louder(modeling_gpt_neox.GPTNeoXAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return 2 * output, weights


class LouderStill(Louder):
    """A subclass that inherits the override."""


@pytest.mark.parametrize("cls", [Louder, LouderStill])
def test_subclass_that_overrides_the_forward_is_refused(cls):
    model = gpt_neox()
    model.gpt_neox.layers[1].attention = cls(model.config, layer_idx=1)
    message = refusal(model)
    assert message.startswith(
        f"tests.originals.test_drift:{cls.__name__}.forward: overrides GPTNeoXAttention.forward, which the adapter "
        "for gpt_neox replaces or relies on; allowed: subclasses that inherit this"
    )
    assert "backend 'native', or register an adapter" in message and "version" not in message
    runs_natively(model)
    backends = {"*layers.1.*": "native", "*": "sdpa"}
    with attnzoo.patch(model, backends) as handle, torch.no_grad():
        model(torch.arange(4)[None])
    assert handle.sites[0].calls == 1


def points():
    adapters = {id(adapter): adapter for name in registry.model_types() if (adapter := registry.find_adapter(name))}
    return [(adapter, point) for adapter in adapters.values() for point in adapter.points]


POINT_IDS = [type(point).__module__.rpartition(".")[2] + "-" + type(point).__name__ for _, point in points()]


@pytest.mark.parametrize(("adapter", "point"), points(), ids=POINT_IDS)
def test_subclass_must_not_override_a_verified_method(adapter, point):
    if point.cls == path_of(torch.nn.Module):
        pytest.skip("the point serves every forward that calls the attention interface")
    base = object_at(point.cls)
    paths = [path.rpartition(".") for path in point.verified]
    names = {name for owner, _, name in paths if owner == point.cls} | {"forward"}
    for name in names:
        cls = type("Sub", (base,), {name: lambda *args: None, "__module__": "theirs"})
        module = cls.__new__(cls)
        if name == "__init__":  # has run before a module is patched
            adapter.check_drift(point, module)
            continue
        with pytest.raises(attnzoo.DriftError) as caught:
            adapter.check_drift(point, module)
        assert str(caught.value).startswith(f"theirs:Sub.{name}: overrides {base.__name__}.{name}, which")
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("adapter", "point"), points(), ids=POINT_IDS)
@pytest.mark.parametrize("cause", ["changed", "replaced", "unreadable"])
def test_message_is_short_for_many_differences(adapter, point, cause):
    family = ", ".join(adapter.model_types)
    detail = {
        "changed": "got fingerprint 0123456789abcdef; allowed: 0123456789abcdef, 0123456789abcdef",
        "replaced": "replaced at run time by function.<locals>.forward of module package.module, line 1000",
        "unreadable": "the source of the function is not available (modeling_reformer.py)",
    }[cause]
    for path in point.verified:
        others = [Difference(other, cause, detail) for other in point.verified]
        differences = (Difference(path, cause, detail), *others)
        theirs = (Difference(path.replace("transformers", "their_package"), cause, detail), *others)
        assert len(drift_module.drift_message(theirs, family, adapter.versions, transformers.__version__)) < 400
        assert len(drift_module.drift_message(differences, family, adapter.versions, transformers.__version__)) < 400


def test_subclass_that_keeps_the_forward_is_served():
    class Marked(modeling_gpt_neox.GPTNeoXAttention):
        """A subclass that overrides nothing."""

    model = gpt_neox()
    model.gpt_neox.layers[1].attention = Marked(model.config, layer_idx=1)
    with attnzoo.patch(model, "sdpa") as handle, torch.no_grad():
        model(torch.arange(4)[None])
    assert [(site.cls, site.calls) for site in handle.sites] == [("GPTNeoXAttention", 1), ("Marked", 1)]


@pytest.mark.parametrize("point", [point for _, point in points()], ids=POINT_IDS)
def test_every_point_is_verified_against_the_installed_transformers(point):
    # Points that only check masks rely on names of arguments, so they need no fingerprint.
    assert point.verified or not point.attends, "a point that attends records fingerprints"
    assert find_drift(dict(point.verified)) == ()


@pytest.mark.parametrize("model_type", registry.model_types())
def test_every_adapter_names_its_verified_versions(model_type):
    adapter = registry.find_adapter(model_type)
    assert model_type in adapter.model_types
    assert adapter.versions == versions_in_makefile()


def versions_in_makefile():
    """The oldest and the newest transformers that CI tests, as adapters name them: ``"5.17 to 5.24"``."""
    text = Path(__file__).parents[2].joinpath("Makefile").read_text(encoding="utf-8")
    ends = (re.search(rf"^{name} := (\d+\.\d+)\.\d+$", text, re.MULTILINE) for name in ("OLDEST", "NEWEST"))
    return " to ".join(end[1] for end in ends)


def test_the_readme_names_the_versions_in_makefile():
    text = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    assert f"verified with transformers {versions_in_makefile()}" in text


CAUSES = {"overridden": "subclasses that inherit this", "replaced": "Restore", "unreadable": "Use the package with"}
CAUSES |= {"changed": "Use a verified version"}


@pytest.mark.parametrize("first", range(len(CAUSES)), ids=list(CAUSES))
def test_message_names_the_nearest_cause_in_any_order_of_differences(first):
    """Subclasses and code at run time also change fingerprints. The message names another version as the last cause."""
    several = [Difference(f"transformers.module:Class.{cause}", cause, "detail") for cause in list(CAUSES)[first:]]
    for given in (several, several[::-1]):
        message = drift_message(given, "mine", "5.17", "5.20")
        assert list(CAUSES.values())[first] in message
        assert f"transformers.module:Class.{list(CAUSES)[first]}" in message
        assert "more" not in message, "differences of other causes are not counted"
        assert "(and 1 more)" in drift_message([*given, several[0]], "mine", "5.17", "5.20")
