"""The backends that the property tests compare with the oracle, each with the attentions that it can compute."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest

import attnzoo
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.registry import registry
from tests.backends.conftest import flash_attn, fresh, on_cpu, varlen, xformers  # noqa: F401
from tests.conftest import DEVICES
from tests.support.drawn_attentions import attentions
from tests.support.uncompiled_flex import uncompiled_flex

AVAILABLE = [name for name, info in attnzoo.backends().items() if info.available and info.exact]


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


def _cases(names):
    """Return the backends on each device, and the fake packages on the CPU."""
    devices = [(device, ()) if isinstance(device, str) else (device.values[0], device.marks) for device in DEVICES]
    return [
        *(pytest.param((name, at), id=f"{name}-{at}", marks=marks) for name in names for at, marks in devices),
        *(pytest.param((name, "fake"), id=f"{name}-fake") for name in FAKES),
    ]


def _subject(request):
    name, device = request.param
    if device == "fake":
        yield FAKES[name](request)
    else:
        with _on_device(name, device) as made:
            yield made


@pytest.fixture(params=_cases(name for name in AVAILABLE if name != "eager"))
def subject(request):
    """Every backend except the oracle."""
    yield from _subject(request)


@pytest.fixture(params=_cases(AVAILABLE))
def subject_or_oracle(request):
    """Every backend and the oracle."""
    yield from _subject(request)
