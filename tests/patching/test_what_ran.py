"""A handle reports the kernels that ran, and independent witnesses catch a false report.

The witnesses: a counter around the backend's own ``run``, and PyTorch's profiler for the kernels behind it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.benchmarks.witness import false_claims, witness
from attnzoo.patching import forwards
from attnzoo.registry import registry


@dataclass(frozen=True)
class Pretending(EagerBackend):
    """A backend that runs eager and reports another kernel."""

    name: ClassVar[str] = "pretending"

    def run(self, attention, probabilities=False):
        return super().run(attention)._replace(kernel="flash")


CLASSES = {"eager": EagerBackend, "sdpa": SdpaBackend, "pretending": Pretending}


@pytest.fixture(autouse=True)
def registered(isolated_registry):
    attnzoo.register_backend(Pretending)


@pytest.fixture
def judge(monkeypatch):
    """Return ``judge(subject, backend)``, which runs a patched model and raises if the handle makes a false report."""

    def go(subject, backend):
        ran, run = Counter(), CLASSES[backend].run

        def counting(self, attention, probabilities=False):
            result = run(self, attention, probabilities)
            ran[result.kernel] += 1
            return result

        with monkeypatch.context() as patched:
            patched.setattr(CLASSES[backend], "run", counting)
            with attnzoo.patch(subject.model, backend) as handle, witness() as operators:
                subject.logits()
        reported = sum((site.kernels for site in handle.sites), Counter())
        assert reported == ran, f"sites report {dict(reported)}, the backend ran {dict(ran)}"
        assert ran.total() == subject.attentions, f"{ran.total()} of {subject.attentions} attentions ran"
        false = false_claims(reported, operators)
        assert not false, f"sites report {', '.join(false)}, the operators that ran are {dict(operators)}"
        assert not any(site.fallbacks for site in handle.sites)
        return handle

    return go


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_handle_reports_the_kernels_that_ran(subject, backend, judge):
    handle = judge(subject, backend)
    assert all(site.backend == backend and site.calls for site in handle.sites)


def test_sdpa_reports_its_kernel(neox, led, judge):
    assert {site.kernel for site in judge(neox, "sdpa").sites} <= {"flash", "flash_cpu"}
    assert "math" not in {site.kernel for site in judge(led, "sdpa").sites}


# False reports


def test_a_kernel_that_did_not_run_is_caught(subject, judge):
    with pytest.raises(AssertionError, match="sites report flash, the operators that ran are"):
        judge(subject, "pretending")


def test_another_backend_in_place_of_the_requested_one_is_caught(subject, judge, monkeypatch):
    def elsewhere(backend, attention, probabilities=False, where=""):
        return EagerBackend().run(attention, probabilities)._replace(kernel="flash_cpu")

    monkeypatch.setattr(forwards, "execute", elsewhere)
    with pytest.raises(AssertionError, match=r"the backend ran \{\}"):
        judge(subject, "sdpa")


def test_calls_that_did_not_happen_are_caught(subject, judge, monkeypatch):
    def twice(self, attention, probabilities=False):
        self.site.kernels["eager"] += 1
        return honest(self, attention, probabilities)

    honest = forwards.SiteAttend.__call__
    monkeypatch.setattr(forwards.SiteAttend, "__call__", twice)
    with pytest.raises(AssertionError, match=r"sites report .* the backend ran"):
        judge(subject, "eager")


def test_calls_that_are_not_counted_are_caught(subject, judge, monkeypatch):
    def silent(self, attention, probabilities=False):
        result = honest(self, attention, probabilities)
        self.site.kernels.clear()
        return result

    honest = forwards.SiteAttend.__call__
    monkeypatch.setattr(forwards.SiteAttend, "__call__", silent)
    with pytest.raises(AssertionError, match=r"sites report \{\}"):
        judge(subject, "eager")


@pytest.fixture
def original_in_disguise(registered):
    """An adapter that runs the model's own forward in the first layer, and no backend."""

    honest = registry.find_adapter("gpt_neox")
    point, *companions = honest.points

    class InDisguise(type(point)):
        def bind(self, cls, attend):
            patched = super().bind(cls, attend)
            return lambda module, *args, **more: (patched if module.layer_idx else cls.forward)(module, *args, **more)

    attnzoo.register_adapter(replace(honest, points=(InDisguise(), *companions)), replace=True)


@pytest.mark.usefixtures("original_in_disguise")
def test_the_models_own_code_in_place_of_the_backend_is_caught(neox, judge):
    with pytest.raises(AssertionError, match="1 of 2 attentions ran"):
        judge(neox, "sdpa")


@pytest.mark.usefixtures("original_in_disguise")
def test_a_handle_counts_no_call_if_an_adapter_runs_the_original(neox):
    with attnzoo.patch(neox.model, "sdpa") as handle:
        neox.logits()
    first, second = handle.sites
    assert (first.calls, first.kernel) == (0, None) and second.calls == 1


@pytest.mark.usefixtures("original_in_disguise")
def test_verify_names_sites_that_were_not_reached(neox):
    report = attnzoo.verify(neox.model, neox.inputs, "sdpa")
    assert report.ok and {site.name for site in report.sites} == {neox.sites[1]}
    assert report.note == f"not checked, because these inputs do not reach them: {neox.sites[0]}"
    assert report.note in str(report) and report.to_dict()["note"] == report.note
