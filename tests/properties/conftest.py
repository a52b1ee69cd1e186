"""The backends that the property tests compare with the oracle, each with the attentions that it can compute."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis.internal.conjecture.engine import ConjectureRunner

import attnzoo
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.backends.varlen.packed import CAPABILITIES
from attnzoo.registry import registry
from tests.backends.conftest import flash_attn, fresh, on_cpu, varlen, xformers  # noqa: F401
from tests.conftest import DEVICES
from tests.support.drawn_attentions import attentions, supported_differences, supported_kinds
from tests.support.uncompiled_flex import uncompiled_flex

AVAILABLE = [name for name, info in attnzoo.backends().items() if info.available and info.exact]


@pytest.fixture(autouse=True)
def only_new_examples(monkeypatch):
    """Let hypothesis draw each example anew.

    Otherwise five of six examples repeat parts of the example before, and 60 examples have only about ten shapes and
    patterns. (Seen in hypothesis 6.170, which has no public setting. The method is private.)
    """
    monkeypatch.setattr(ConjectureRunner, "generate_mutations_from", lambda runner, data: None)


@dataclass(frozen=True)
class Subject:
    """A backend, and the limits of the attentions that it can compute."""

    backend: attnzoo.Backend
    device: str = "cpu"
    grad: bool = True
    limits: dict[str, Any] = field(default_factory=dict)

    def attentions(self, **more):
        """Return the strategy for attentions that the backend should compute."""
        return attentions(self.backend.capabilities, **{**self.limits, **more})


@contextlib.contextmanager
def _on_device(name, device):
    compiles = name == "flex_attention" and device == "cpu"
    with uncompiled_flex() if compiles else contextlib.nullcontext():
        yield Subject(registry.make_backend(name), device, grad=not compiles)


def _fake(request, package, backend):
    request.getfixturevalue(package)
    return Subject(backend(), limits=dict(dims=(8, 16)))


FAKES = {
    "flash_attn": lambda request: _fake(request, "flash_attn", lambda: FlashBackend(kernel="flash_attn")),
    "varlen": lambda request: _fake(request, "varlen", lambda: FlashBackend(kernel="varlen")),
    "xformers": lambda request: _fake(request, "xformers", lambda: registry.make_backend("xformers")),
}


def _cases(names, of_backend=lambda capabilities: [None]):
    """Return ``(name, device, value)`` for backends on each device, for fake packages, and for values of a backend.

    On CUDA, each form of ``flex_attention`` takes more than a minute to compile, so ``test_compiled_flex.py`` draws
    many attentions of a few forms instead.
    """
    devices = [(device, ()) if isinstance(device, str) else (device.values[0], device.marks) for device in DEVICES]
    classes = {**{name: attnzoo.backends()[name] for name in names}, **dict.fromkeys(FAKES, CAPABILITIES)}
    on_devices = [(name, at, marks) for name in names for at, marks in devices]
    cases = [case for case in on_devices if case[:2] != ("flex_attention", "cuda")] + [
        (name, "fake", ()) for name in FAKES
    ]
    return [
        pytest.param((name, at, value), id="-".join(filter(None, (name, at, value))), marks=marks)
        for name, at, marks in cases
        for value in of_backend(getattr(classes[name], "capabilities", classes[name]))
    ]


def _subject(request):
    name, device, _ = request.param
    if device == "fake":
        yield FAKES[name](request)
    else:
        with _on_device(name, device) as made:
            yield made


EXCEPT_THE_ORACLE = [name for name in AVAILABLE if name != "eager"]


@pytest.fixture(params=_cases(EXCEPT_THE_ORACLE))
def subject(request):
    """Every backend except the oracle."""
    yield from _subject(request)


def _other_kinds(capabilities):
    """Return the supported kinds except "one difference", which a separate test draws."""
    return [kind for kind in supported_kinds(capabilities) if kind != "one difference"]


@pytest.fixture(params=_cases(EXCEPT_THE_ORACLE, _other_kinds))
def subject_and_kind(request):
    """Every backend except the oracle, with the kinds of attention that the backend supports."""
    for subject in _subject(request):
        yield subject, request.param[2]


@pytest.fixture(params=_cases(EXCEPT_THE_ORACLE, supported_differences))
def subject_and_difference(request):
    """Every backend except the oracle, with each property in which one of several segments may differ."""
    for subject in _subject(request):
        yield subject, request.param[2]


@pytest.fixture(params=_cases(AVAILABLE))
def subject_or_oracle(request):
    """Every backend and the oracle."""
    yield from _subject(request)
