"""The conformance kit passes every registered backend, and detects faulty ones."""

import contextlib
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo import testing
from attnzoo.backends.eager import EagerBackend, evaluate
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.conformance import kit
from attnzoo.registry import registry
from tests.support.uncompiled_flex import uncompiled_flex

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact_backends():
    return [name for name, info in attnzoo.backends().items() if info.available and info.exact]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", exact_backends())
def test_backend_runs_what_it_declares_and_refuses_the_rest(backend, dtype, device):
    if dtype not in attnzoo.backends()[backend].capabilities.dtypes:
        with pytest.raises(testing.ConformanceError, match=r"0 cases ran.* 0 failed.*refuses all cases"):
            testing.check_backend(backend, device=device, dtypes=(dtype,))
        return
    # FlexAttention compiles for seconds in each dtype, so float16 runs without the compiler.
    with uncompiled_flex() if (device, dtype) == ("cpu", torch.float16) else contextlib.nullcontext():
        report = testing.check_backend(backend, device=device, dtypes=(dtype,))
    assert len(report.outcomes) > 200


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", sorted(attnzoo.backends()))
def test_kit_has_cases_for_every_declared_device(backend, dtype):
    """The devices include those that this machine lacks, because the kit fails if a backend refuses all cases."""
    configured = registry.configure(backend, **registry.backend_class(backend).example)
    for device in sorted(configured.capabilities.devices) if dtype in configured.capabilities.dtypes else ():
        requests = (case.attention().request(case.probabilities) for case in testing.cases((dtype,)))
        assert any(not configured.refusals_anywhere(replace(request, device=device)) for request in requests), device


def test_cases_with_other_shapes_have_masks_per_head_and_biases_per_sample():
    batch, heads = 3, 4
    for other_shapes, first in ((False, (batch, 1)), (True, (1, heads))):
        case = testing.AttentionCase(torch.float32, attnzoo.Full(), "dense", "dense", other_shapes=other_shapes)
        (segment,) = case.attention().segments
        second = (1, heads) if first == (batch, 1) else (batch, 1)
        assert segment.mask.shape[:2] == first and segment.bias.values.shape[:2] == second
        (segment,) = replace(case, bias="relative").attention().segments
        assert segment.bias.values.shape[0] == (1 if other_shapes else heads)
        assert (segment.bias.positions is not None) == other_shapes


@pytest.fixture
def short_kit(monkeypatch):
    """A sample of the kit without long cases and transforms, which take most of the time."""
    short = [case for case in testing.cases((torch.float32,)) if case.q_len < 100 and not case.transform][::3]
    monkeypatch.setattr(kit, "cases", lambda dtypes: [replace(case, dtype=dtype) for dtype in dtypes for case in short])


@pytest.fixture
def registered(isolated_registry):
    """A function that registers a backend class for one test and returns its name."""
    return lambda cls: attnzoo.register_backend(cls).name


def narrow(**capabilities):
    base = dict(devices=frozenset({"cpu"}), patterns=EagerBackend.capabilities.patterns, segments=9, grad=True)
    return attnzoo.Capabilities(**{**base, **capabilities})


@dataclass(frozen=True)
class Liar(attnzoo.Backend):
    """``eager`` with a fault."""

    name: ClassVar[str] = "liar"
    capabilities: ClassVar[attnzoo.Capabilities] = EagerBackend.capabilities

    def run(self, attention, probabilities=False):
        return EagerBackend().run(self.change(attention), probabilities)

    def change(self, attention):
        return attention


def changes(**fields):
    """Return a function that changes fields of all segments, or of the whole attention."""

    def change(self, attention):
        if fields.keys() <= vars(attention).keys():
            return replace(attention, **fields)
        return replace(attention, segments=tuple(replace(segment, **fields) for segment in attention.segments))

    return change


@pytest.mark.usefixtures("short_kit")
@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (changes(key_mask=None), "mask keys"),
        (changes(mask=None), "mask dense"),
        (changes(bias=None), "bias relative"),
        (changes(pattern=attnzoo.Full()), "Causal"),
        (changes(query_mask=None), "mask globals"),
        (changes(dropout=0.0), "dropout"),
        (lambda self, attention: replace(attention, dropout=attention.dropout / 2), "dropout"),
        (lambda self, attention: replace(attention, scale=attention.scale * 1.01), "output"),
        (lambda self, attention: replace(attention, segments=attention.segments[:1]), "globals"),
    ],
    ids=["key mask", "dense mask", "bias", "pattern", "query mask", "no dropout", "half dropout", "scale", "segment"],
)
def test_kit_detects_a_backend_that_ignores_part_of_the_attention(registered, lie, message):
    name = registered(type("Lying", (Liar,), {"change": lie}))
    with pytest.raises(testing.ConformanceError, match=message):
        testing.check_backend(name, dtypes=(torch.float32,))


class Detached(Liar):
    def run(self, attention, probabilities=False):
        output = evaluate(attention).output
        return attnzoo.Result(output.detach() + 0.5 * (output - output.detach()), "half")


class Crashing(Liar):
    def run(self, attention, probabilities=False):
        raise RuntimeError("kernel exploded")


class Silent(Liar):
    def run(self, attention, probabilities=False):
        return EagerBackend().run(attention, False)


class Vague(Liar):
    def refusals(self, request):
        return (attnzoo.Refusal("dtype", "", ""),) if request.dropout else ()


class Nothing(Liar):
    capabilities: ClassVar[attnzoo.Capabilities] = narrow(dtypes=frozenset())


@pytest.mark.usefixtures("short_kit")
@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (Detached, "gradient"),
        (Crashing, "supports this case, but raised RuntimeError: kernel exploded"),
        (Silent, "supports probabilities, but did not return"),
        (Vague, "empty field, got or allowed"),
        (Nothing, "refuses all cases"),
    ],
)
def test_kit_detects_a_faulty_backend(registered, faulty, message):
    with pytest.raises(testing.ConformanceError, match=message):
        testing.check_backend(registered(faulty), dtypes=(torch.float32,))


@pytest.mark.usefixtures("short_kit")
def test_kit_runs_only_declared_dtypes(registered):
    class Narrow(Liar):
        capabilities: ClassVar[attnzoo.Capabilities] = narrow(dtypes=frozenset({torch.float32}))

    report = testing.check_backend(registered(Narrow), dtypes=(torch.float32, torch.float64))
    assert {outcome.case.dtype for outcome in report.outcomes if not outcome.refused} == {torch.float32}


@pytest.mark.usefixtures("short_kit")
def test_kit_accepts_a_configured_backend():
    assert not testing.check_backend(SdpaBackend(), dtypes=(torch.float32,)).failures


@pytest.mark.parametrize("backend", [SdpaBackend, None, 3])
def test_kit_refuses_objects_that_are_no_backend(backend):
    with pytest.raises(
        attnzoo.InvalidArgumentError, match=r"backend: got .*; allowed: a registered name, or a backend"
    ):
        testing.check_backend(backend)
