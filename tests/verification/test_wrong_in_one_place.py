"""``verify`` rejects candidates that are wrong in one place only and says where, and accepts right candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
import transformers

import attnzoo
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.spec.segments import Attention
from attnzoo.verification.reports import Report
from tests.support.models import causal_inputs, gpt_neox, ids, led, led_inputs, longt5, longt5_inputs
from tests.verification.planted_faults import scale_gradient

GRADIENT = "gradient of all parameters"


@dataclass(frozen=True, eq=False)
class Candidate(attnzoo.Backend):
    """``sdpa`` on ``before(attention)``, and then ``after(attention, output)``."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    name: ClassVar[str] = "candidate"
    capabilities: ClassVar[attnzoo.Capabilities] = SdpaBackend.capabilities

    before: Callable[[Attention], Attention] = lambda attention: attention
    after: Callable[[Attention, torch.Tensor], torch.Tensor] = lambda attention, output: output

    def run(self, attention, probabilities=False):
        result = SdpaBackend().run(self.before(attention))
        return result._replace(output=self.after(attention, result.output))


def replaced(capabilities, **changes):
    """Return a right candidate with other capabilities."""
    return type("Narrow", (Candidate,), {"capabilities": replace(capabilities, **changes)})()


def wrong_if(condition, by=1.01):
    """A candidate whose output is wrong by a factor in attentions that meet a condition."""
    return Candidate(after=lambda attention, output: output * by if condition(attention) else output)


def trains(attention):
    return attention.request().grad


def infers(attention):
    return not attention.request().grad


WRONG = wrong_if(lambda attention: True)


def rows_wrong(start, stop):
    def after(attention, output):
        by = torch.ones(attention.q_len, 1)
        by[start:stop] = 1.01
        return output * by

    return Candidate(after=after)


def sample_wrong(sample):
    def after(attention, output):
        by = torch.ones(attention.batch, 1, 1, 1)
        by[sample] = 1.01
        return output * by

    return Candidate(after=after)


def padding_rows_not_zero(attention, output):
    shown = attention.query_mask
    return output if shown is None else output + 0.1 * ~shown[:, None, :, None]


def bias_gradient_wrong(attention):
    head, *rest = attention.segments
    if head.bias is None:
        return attention
    bias = replace(head.bias, values=scale_gradient(head.bias.values))
    return replace(attention, segments=(replace(head, bias=bias), *rest))


def nan_in_one_row(attention, output):
    hole = torch.zeros(attention.q_len, 1)
    hole[attention.q_len // 3] = float("nan")
    return output + hole


@dataclass(frozen=True, eq=False)
class InFloat32(Candidate):
    """A candidate that computes in float32, whatever the dtype."""

    def run(self, attention, probabilities=False):
        narrow = attention.with_tensors(tuple(tensor.float() for tensor in attention.tensors()))
        result = SdpaBackend().run(narrow)
        return result._replace(output=result.output.to(attention.query.dtype))


@dataclass(frozen=True, eq=False)
class StaleKeys(Candidate):
    """A candidate that uses the keys of the first call in all calls of equal shape, like a stale cache."""

    kept: dict = field(default_factory=dict)

    def run(self, attention, probabilities=False):
        (segment,) = attention.segments
        key = self.kept.setdefault((segment.key.shape, attention.request().grad), segment.key.detach().clone())
        return SdpaBackend().run(replace(attention, segments=(replace(segment, key=key),)))


class CallsTwice(torch.nn.Module):
    """A model that calls each attention twice in one forward."""

    def __init__(self):
        super().__init__()
        self.inner = gpt_neox(num_hidden_layers=1)

    def forward(self, input_ids):
        return {"first": self.inner(input_ids).logits, "second": self.inner(input_ids.flip(1)).logits}


class Wrapped(torch.nn.Module):
    """GPT-NeoX whose outputs ``change`` spoils while the model is patched with sdpa.

    ``before`` may change the tokens in place.
    """

    def __init__(self, change=lambda outputs: outputs, before=lambda input_ids: None):
        super().__init__()
        self.inner, self.change, self.before = gpt_neox(), change, before

    def forward(self, input_ids):
        patched = attnzoo.is_patched(self) and attnzoo.handle(self).sites[0].backend == "sdpa"
        if patched:
            self.before(input_ids)
        states = self.inner.gpt_neox(input_ids).last_hidden_state
        outputs = {"states": states, "logits": self.inner.get_output_embeddings()(states)}
        return self.change(outputs) if patched else outputs


class SkipsALayer(torch.nn.Module):
    """GPT-NeoX that does not call its last attention while the model is patched with sdpa."""

    def __init__(self):
        super().__init__()
        self.inner = gpt_neox()

    def forward(self, input_ids):
        if attnzoo.is_patched(self) and attnzoo.handle(self).sites[0].backend == "sdpa":
            layers = self.inner.gpt_neox.layers
            self.inner.gpt_neox.layers = layers[:-1]
            try:
                return {"logits": self.inner(input_ids).logits}
            finally:
                self.inner.gpt_neox.layers = layers
        return {"logits": self.inner(input_ids).logits}


def logits_wrong(outputs):
    return {**outputs, "logits": outputs["logits"] * 1.01}


def wrong_with_gradients_only(outputs):
    """The output is wrong by an added constant, which does not change gradients."""
    return {**outputs, "logits": outputs["logits"] + 0.1} if torch.is_grad_enabled() else outputs


def loses_an_output(outputs):
    return {"states": outputs["states"]}


def neox_tokens(length=21, batch=1):
    return dict(input_ids=ids(batch, length))


NEOX = [f"gpt_neox.layers.{number}.attention" for number in (0, 1)]
ENCODER = [f"led.encoder.layers.{number}.self_attn.longformer_self_attn" for number in (0, 1)]
CROSS = [f"led.decoder.layers.{number}.encoder_attn" for number in (0, 1)]
LAST = {"*layers.1.attention": WRONG, "*": "sdpa"}


@dataclass(frozen=True)
class Case:
    """A wrong candidate, and the places of the comparisons that fail. ``model`` stands for any end-to-end comparison.

    Attributes:
        sites: names of the attentions that fail. None: any.
        outputs: names of the failed end-to-end comparisons. None: at least one of any name.
    """

    build: Callable[[], torch.nn.Module]
    inputs: dict
    backend: object
    sites: list[str] | None
    outputs: set[str] | None
    options: dict = field(default_factory=dict)


def led_case(backend, sites, outputs, length=26, side="left", **options):
    return Case(led, led_inputs(length, side, batch=2), backend, sites, outputs, options)


def neox_case(backend, sites, outputs, build=gpt_neox, inputs=None, **options):
    return Case(build, neox_tokens() if inputs is None else inputs, backend, sites, outputs, options)


FORWARD_ONLY = dict(gradients=False)
CASES = {
    "the rows of global tokens": led_case(
        {"*encoder.layers*": wrong_if(lambda a: len(a.segments) == 1), "*": "sdpa"}, ENCODER, None, **FORWARD_ONLY
    ),
    "the last layer": neox_case(LAST, NEOX[1:], None),
    "the cross-attention of the decoder": led_case({"*encoder_attn": WRONG, "*": "sdpa"}, CROSS, None),
    "the gradient of a learned bias": Case(
        partial(longt5, num_layers=1, num_decoder_layers=1), longt5_inputs(21, "none", batch=1),
        Candidate(bias_gradient_wrong), None, {GRADIENT},
    ),
    "middle rows of a long input, between the sampled rows": neox_case(
        rows_wrong(150, 152), [], None, inputs=neox_tokens(300), max_rows=8, **FORWARD_ONLY
    ),
    "middle rows of a long input": neox_case(
        rows_wrong(150, 152), NEOX, None, inputs=neox_tokens(300), max_rows=300, **FORWARD_ONLY
    ),
    "middle rows of the outputs": neox_case(
        {"*layers.1.attention": rows_wrong(150, 152), "*": "sdpa"}, NEOX[1:], None, inputs=neox_tokens(300),
        max_rows=300, **FORWARD_ONLY,
    ),
    "one sample of a batch": neox_case(sample_wrong(1), NEOX, None, inputs=causal_inputs(21, "none"), **FORWARD_ONLY),
    "only in samples with padding": neox_case(
        wrong_if(lambda a: a.segments[0].key_mask is not None and not bool(a.segments[0].key_mask.all())),
        NEOX, None, inputs=causal_inputs(21, "left"), **FORWARD_ONLY,
    ),
    "padding queries not zero": led_case(Candidate(after=padding_rows_not_zero), ENCODER, set(), **FORWARD_ONLY),
    "a float64 model computed in float32": neox_case(InFloat32(), NEOX, None, build=lambda: gpt_neox().double()),
    "only with gradients": neox_case(wrong_if(trains), NEOX, {"logits (gradients enabled)", GRADIENT}),
    "only with gradients, fast": neox_case(wrong_if(trains), NEOX, set(), fast=True),
    "only without gradients": neox_case(wrong_if(infers), [], {"logits"}),
    "only without gradients, fast": neox_case(wrong_if(infers), [], {"logits"}, fast=True),
    "a constant, only with gradients": neox_case(
        "sdpa", [], {"logits (gradients enabled)"}, build=lambda: Wrapped(wrong_with_gradients_only)
    ),
    "the second call of a module": neox_case(StaleKeys(), None, {"second"}, build=CallsTwice, **FORWARD_ONLY),
    "a patched layer is skipped": neox_case("sdpa", [], None, build=SkipsALayer, **FORWARD_ONLY),
    "the logits, not the hidden states": neox_case(
        "sdpa", [], {"logits"}, build=lambda: Wrapped(logits_wrong), **FORWARD_ONLY
    ),
    "an output is missing": neox_case(
        "sdpa", [], {"logits", "logits (gradients enabled)", GRADIENT}, build=lambda: Wrapped(loses_an_output)
    ),
    "the inputs change in place": neox_case(
        "sdpa", [], {"states", "logits"}, build=lambda: Wrapped(before=lambda ids: ids[:, 3:5].fill_(7)), **FORWARD_ONLY
    ),
    "NaN in one row": neox_case(Candidate(after=nan_in_one_row), NEOX, {"logits"}, **FORWARD_ONLY),
}  # fmt: skip


def failed_sites(report: Report) -> list[str]:
    return list(dict.fromkeys(site.name for site in report.sites if not site.ok))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_candidate_that_is_wrong_in_one_place_is_rejected_at_this_place(case):
    report = attnzoo.verify(case.build(), case.inputs, case.backend, **case.options)
    assert not report.ok
    failed = {check.what for check in report.end_to_end if not check.ok}
    assert bool(failed) if case.outputs is None else failed == case.outputs, str(report)
    if case.sites is not None:
        assert failed_sites(report) == case.sites, str(report)
    assert all(check.ok for check in report.original) and all(site.ok for site in report.original_sites)
    text = " ".join(str(report).split())
    assert all(f"{name}: " in text for name in failed_sites(report)) and text.endswith("NOT within the error rule")
    assert all(f"model: {what}: error" in text for what in failed)


def test_inputs_of_the_user_stay_unchanged():
    inputs, cache = neox_tokens(), transformers.DynamicCache()
    attnzoo.verify(Wrapped(before=lambda ids: ids.fill_(7)), inputs, gradients=False)
    assert torch.equal(inputs["input_ids"], neox_tokens()["input_ids"])
    model = gpt_neox()
    with torch.no_grad():
        model(ids(1, 5), past_key_values=cache)
    report = attnzoo.verify(model, {**neox_tokens(), "past_key_values": cache}, gradients=False)
    assert report.ok and cache.get_seq_length() == 5, "each run starts with the cache of the user"


def test_original_of_a_patched_model_is_the_unpatched_model():
    model = gpt_neox()
    with attnzoo.patch(model, WRONG):
        report = attnzoo.verify(model, neox_tokens(), "sdpa", gradients=False)
    assert report.ok, str(report)


def test_calls_that_fell_back_are_named():
    """The report names the sites, and does not check them as sites of the backend."""
    backend = {"*encoder_attn": replaced(SdpaBackend.capabilities, patterns=frozenset({attnzoo.Causal})), "*": "sdpa"}
    report = attnzoo.verify(led(), led_inputs(26, "none", batch=1), backend, gradients=False, fallback="native")
    assert f"calls fell back to the model's own code, which only the outputs show, at {', '.join(CROSS)}" in report.note
    assert "do not reach" not in report.note and not {site.name for site in report.sites} & set(CROSS)


class WrongUnlessPatched(torch.nn.Linear):
    """A projection whose gradient is wrong while the model is not patched."""

    def __init__(self, linear, model, wrong):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        vars(self).update(model=model, wrong=wrong)  # not as a submodule

    def forward(self, states):
        right = attnzoo.is_patched(self.model)
        states = scale_gradient(states) if self.wrong == "states" and not right else states
        weight = scale_gradient(self.weight) if self.wrong == "weight" and not right else self.weight
        return torch.nn.functional.linear(states, weight, self.bias)


@pytest.mark.parametrize(("projection", "wrong"), [("dense", "weight"), ("query_key_value", "states")])
def test_wrong_gradient_of_the_models_own_code_is_named(projection, wrong):
    model = gpt_neox()
    attention = model.gpt_neox.layers[1].attention
    setattr(attention, projection, WrongUnlessPatched(getattr(attention, projection), model, wrong))
    report = attnzoo.verify(model, neox_tokens())
    assert all(check.ok for check in report.end_to_end) and not failed_sites(report), "the patched model is right"
    failed = [(site.name, check.what) for site in report.original_sites for check in site.checks if not check.ok]
    assert failed == [(NEOX[1], "gradient")] and not report.ok
    assert [check.what for check in report.original if not check.ok] == [GRADIENT]
    assert f"original {NEOX[1]}: gradient: error" in " ".join(str(report).split())


def test_skipped_layer_is_named():
    report = attnzoo.verify(SkipsALayer(), neox_tokens(), gradients=False)
    assert f"these inputs do not reach them: inner.{NEOX[1]}" in report.note


def test_site_of_the_wrong_gradient_of_a_bias_is_named():
    case = CASES["the gradient of a learned bias"]
    report = attnzoo.verify(case.build(), case.inputs, case.backend)
    failed = [(site.name, check.what) for site in report.sites for check in site.checks if not check.ok]
    assert failed and {what for _, what in failed} == {"gradient"}
    assert not any("EncDecAttention" in name for name, _ in failed), "cross-attention has no bias"
