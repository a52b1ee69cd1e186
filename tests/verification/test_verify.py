"""``verify`` passes right models, detects wrong ones, and changes nothing."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.registry import registry
from tests.support.models import FAMILIES, gpt_bigcode, gpt_neox, led, led_inputs

ADAPTER = "check the adapter"
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@dataclass(frozen=True)
class Wrong(attnzoo.Backend):
    """``eager`` on an attention that ``spoil`` has changed."""

    name: ClassVar[str] = "wrong"
    capabilities: ClassVar[attnzoo.Capabilities] = replace(EagerBackend.capabilities, probabilities=False)

    def run(self, attention, probabilities=False):
        return EagerBackend().run(self.spoil(attention))


SPOILS = {
    "scale": lambda self, a: replace(a, scale=a.scale * 1.001),
    "key mask": lambda self, a: replace(a, segments=tuple(replace(s, key_mask=None) for s in a.segments)),
    "pattern": lambda self, a: replace(a, segments=tuple(replace(s, pattern=attnzoo.Full()) for s in a.segments)),
    "a segment": lambda self, a: replace(a, segments=a.segments[:1]),
}


@pytest.fixture
def wrong(request):
    cls = attnzoo.register_backend(type("Spoiled", (Wrong,), {"spoil": SPOILS[request.param]}))
    yield cls.name
    attnzoo.unregister_backend(cls.name)


@pytest.mark.parametrize("wrong", SPOILS, indirect=True)
def test_wrong_backend_fails_at_its_sites_and_end_to_end(wrong):
    report = attnzoo.verify(led(), led_inputs(37, "left"), wrong)
    assert not report.ok
    assert any(not site.ok for site in report.sites)
    assert any(not check.ok for check in report.end_to_end)
    assert all(check.ok for check in report.original), "the original is right"
    assert "FAILS" in str(report) and "NOT within the error rule" in str(report) and ADAPTER not in str(report)


def test_adapter_that_differs_from_the_model_fails_in_the_original(monkeypatch):
    from attnzoo.adapters import longformer

    window = longformer._window
    monkeypatch.setattr(longformer, "_window", lambda module: attnzoo.Window(window(module).left - 1, 2))
    report = attnzoo.verify(led(), led_inputs(37, "left"), "sdpa")
    assert all(site.ok for site in report.sites), "the backend computes the adapter's attention"
    assert all(check.ok for check in report.end_to_end)
    assert not report.ok and not all(check.ok for check in report.original), "but the model computes another attention"
    assert ADAPTER in str(report)
    wrong = {site.name for site in report.original_sites if not site.ok}
    assert wrong == {f"led.encoder.layers.{n}.self_attn.longformer_self_attn" for n in (0, 1)}, "at these modules"


@families
def test_verify_leaves_the_model_and_the_random_stream_unchanged(family):
    model, inputs = family.build().train(), family.inputs(37, "left")
    random, config = torch.get_rng_state(), model.config.to_dict()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = attnzoo.verify(model, inputs, "sdpa")
    assert report.ok, str(report)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config.to_dict() == config
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_patched_model_is_compared_with_the_unpatched_model():
    model = led()
    with attnzoo.patch(model, "eager") as handle:
        assert attnzoo.verify(model, led_inputs(26, "none"), "sdpa").ok
        assert handle.active


def test_verify_without_gradients_and_with_frozen_parameters():
    model = led().requires_grad_(False)
    report = attnzoo.verify(model, led_inputs(26, "none"), "sdpa")
    assert report.ok and not any("gradient" in check.what for check in report.end_to_end)
    report = attnzoo.verify(led(), led_inputs(26, "none"), "sdpa", gradients=False)
    assert report.ok and not any("gradient" in check.what for site in report.sites for check in site.checks)


def test_gradients_are_compared_under_no_grad_and_refused_in_inference_mode():
    with torch.no_grad():
        report = attnzoo.verify(led(), led_inputs(26, "none"))
    assert report.ok and any("gradient" in check.what for check in report.end_to_end)
    with torch.inference_mode():
        assert attnzoo.verify(led(), led_inputs(26, "none"), gradients=False).ok
        with pytest.raises(attnzoo.InvalidArgumentError, match=r"gradients: got True inside .*; allowed: False, or"):
            attnzoo.verify(led(), led_inputs(26, "none"))


def test_model_that_returns_a_tuple_is_compared_item_by_item():
    report = attnzoo.verify(led(), {**led_inputs(37, "left"), "return_dict": False}, "sdpa")
    assert report.ok, str(report)
    what = {check.what.partition(" ")[0] for check in report.end_to_end}
    assert what == {"output[0]", "output[2]", "gradient"}, "logits, (cache), states of the encoder"


def test_report_converts_to_plain_data():
    data = attnzoo.verify(led(), led_inputs(26, "left"), "sdpa").to_dict()
    assert data["ok"] is True and data["backend"] == "sdpa"
    check = data["end_to_end"][0]
    assert check.keys() == {"what", "error", "eager_error", "recomputed_error", "scale", "budget", "ok"}
    assert [site["name"] for site in data["original_sites"]] == list(dict.fromkeys(s["name"] for s in data["sites"]))
    assert {site["kernel"] for site in data["sites"]} == {"flash", "flash_cpu"}


@pytest.mark.parametrize("inputs", [None, [1, 2], torch.zeros(2, 3)])
def test_inputs_must_be_keyword_arguments(inputs):
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"inputs: got .*; allowed: a mapping of keyword arguments"):
        attnzoo.verify(led(), inputs)


@pytest.mark.parametrize("model", [None, "led", dict])
def test_model_must_be_a_module(model):
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"model: got .*; allowed: a torch\.nn\.Module"):
        attnzoo.verify(model, {})


@pytest.mark.parametrize("rows", [0, 1, -3, 2.5, "all", True])
def test_invalid_max_rows_is_refused(rows):
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"max_rows: got .*; allowed: an integer >= 2"):
        attnzoo.verify(led(), led_inputs(26, "none"), max_rows=rows)


@families
@pytest.mark.parametrize("side", ["none", "left", "right", "sample"])
def test_native_compares_the_models_own_code_module_by_module(family, side):
    report = attnzoo.verify(family.build(), family.inputs(37, side), "native")
    assert report.ok, str(report)
    assert report.sites == report.original_sites and {site.kernel for site in report.sites} == {"native"}
    assert {check.what for site in report.sites for check in site.checks} == {"output", "gradient"}


def test_native_at_some_sites_of_the_model():
    model = led()
    report = attnzoo.verify(model, led_inputs(26, "left"), {"*encoder_attn": "native", "*": "sdpa"})
    kernels = {site.name: site.kernel for site in report.sites}
    assert report.ok, str(report)
    assert {name for name, kernel in kernels.items() if kernel == "native"} == {
        f"led.decoder.layers.{number}.encoder_attn" for number in (0, 1)
    }


def test_original_with_a_known_fault_is_not_compared():
    model = gpt_bigcode(multi_query=False, add_cross_attention=True, is_decoder=True)
    states = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    inputs = dict(input_ids=torch.full((3, 9), 5), encoder_hidden_states=states)
    report = attnzoo.verify(model, inputs, "sdpa")
    assert report.ok and report.fault and not report.original_sites


def test_bias_on_sorted_keys_is_refused_by_sdpa_and_supported_by_eager():
    segment = attnzoo.SegmentRequest(attnzoo.spec.patterns.SortedChunks(4), 4, bias="relative")
    request = attnzoo.Request("cpu", torch.float32, 4, 8, 8, (segment,))
    (refusal,) = registry.make_backend("sdpa").refusals(request)
    assert refusal.field == "bias" and "SortedChunks" in refusal.got
    assert not registry.make_backend("eager").refusals(request)


class LosesAnOutput(torch.nn.Module):
    """A model that returns one output less when it is patched with sdpa."""

    def __init__(self):
        super().__init__()
        self.inner = gpt_neox()

    def forward(self, **inputs):
        logits = self.inner(**inputs).logits
        loses = attnzoo.is_patched(self) and attnzoo.handle(self).sites[0].backend == "sdpa"
        return {"logits": logits} if loses else {"logits": logits, "square": logits.square()}


def test_missing_output_fails():
    inputs = dict(input_ids=torch.arange(3, 15)[None])
    report = attnzoo.verify(LosesAnOutput().eval(), inputs, "sdpa", gradients=False)
    assert not report.ok and {check.what: check.ok for check in report.end_to_end} == {"logits": True, "square": False}
    assert attnzoo.verify(LosesAnOutput().eval(), inputs, "native", gradients=False).ok
