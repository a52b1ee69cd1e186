"""A contender that is wrong in one place only has a row with the reason and no speed. A right contender has a speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnzoo import Choice, Window, register_backend
from attnzoo.backends.eager import EagerBackend
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.benchmarks.witness import misreports
from attnzoo.patching import forwards
from tests.benchmarks.conftest import assert_no_measurements, line_of, printed, row_of
from tests.verification.planted_faults import scale_gradient

# The number of attentions in one forward of TINY: 2 at each of 2 encoder layers, and 4 in the decoder.
ATTENTIONS = 8


@dataclass(frozen=True)
class Contender(EagerBackend):
    """``eager``, to which each subclass adds one fault. ``calls`` counts the calls of :meth:`run`."""

    name: ClassVar[str] = "contender"
    calls: ClassVar[list[int]] = [0]

    def count(self) -> int:
        self.calls[0] += 1
        return self.calls[0]


@pytest.fixture(autouse=True)
def no_calls():
    Contender.calls[0] = 0


def run(attention, by=1.0, kernel="eager"):
    result = EagerBackend().run(attention)
    return result._replace(output=result.output * by, kernel=kernel)


def wrong(fault: Callable[[Any, Any], Any]) -> type[Contender]:
    """Return a class whose ``run`` is a function of the backend and the attention."""

    @dataclass(frozen=True)
    class Faulty(Contender):
        def run(self, attention, probabilities=False):
            return fault(self, attention)

    return Faulty


def value_gradient_wrong(self, attention):
    segments = tuple(replace(segment, value=scale_gradient(segment.value)) for segment in attention.segments)
    return run(replace(attention, segments=segments))


def nan_in_the_last_row(self, attention):
    hole = torch.zeros(attention.q_len, 1)
    hole[-1] = float("nan")
    result = run(attention)
    return result._replace(output=result.output + hole)


def flash_behind_plain_operations(self, attention):
    return SdpaBackend().run(attention)._replace(kernel="eager")


def math_behind_flash(self, attention):
    with sdpa_kernel(SDPBackend.MATH):
        states = torch.ones(1, 1, 2, 8)
        torch.nn.functional.scaled_dot_product_attention(states, states, states)
    return run(attention, kernel="flash")


def flash_in_the_first_call_only(self, attention):
    if self.count() % ATTENTIONS == 1:
        return SdpaBackend().run(attention)._replace(kernel="flash")
    return run(attention, kernel="flash")


def crash_in_the_timed_runs(self, attention):
    if self.count() > 40:
        raise RuntimeError("the kernel fell over")
    return run(attention)


class OtherBackendInTheDecoder(Contender):
    """Another backend runs the attentions with few queries."""

    def select(self, attention, probabilities=False):
        return Choice(SdpaBackend() if attention.q_len < 30 else self)


class UndeclaredPattern(Contender):
    """A query sees fewer keys. The backend changes the oracle too, but does not declare the change."""

    def rewrite(self, attention, decisions=None):
        first, *rest = attention.segments
        pattern = Window(first.pattern.left - 1, first.pattern.right) if isinstance(first.pattern, Window) else None
        return attention if pattern is None else replace(attention, segments=(replace(first, pattern=pattern), *rest))

    def run(self, attention, probabilities=False):
        return run(self.rewrite(attention))


class NarrowWindow(UndeclaredPattern):
    """A query sees fewer keys. The backend does not declare the change."""

    def run(self, attention, probabilities=False):
        return run(super().rewrite(attention))

    def rewrite(self, attention, decisions=None):
        return attention


OUTSIDE = "outside the error budget"
WRONG = {
    "outputs": (wrong(lambda self, a: run(a, 1.01)), "red", OUTSIDE),
    "only gradients": (wrong(value_gradient_wrong), "red", "gradient: error"),
    "only gradients of the rows of global tokens": (
        wrong(lambda self, a: value_gradient_wrong(self, a) if a.q_len == 1 else run(a)), "red", "gradient: error",
    ),
    "only long inputs": (wrong(lambda self, a: run(a, 1.01 if a.q_len > 32 else 1.0)), "red", OUTSIDE),
    "only one sample": (wrong(lambda self, a: run(a, torch.tensor([1.0, 1.01])[:, None, None, None])), "red", OUTSIDE),
    "only NaN in the last row": (wrong(nan_in_the_last_row), "red", "error inf"),
    "only the last layer of the first two forwards": (
        wrong(lambda self, a: run(a, 1.01 if self.count() in (ATTENTIONS, 2 * ATTENTIONS) else 1.0)), "red", OUTSIDE,
    ),
    "only the second run and later": (
        wrong(lambda self, a: run(a, 1.01 if self.count() > ATTENTIONS else 1.0)), "red", OUTSIDE,
    ),
    "only after the gate": (
        wrong(lambda self, a: run(a, 1.01 if self.count() > 40 else 1.0)), "red", "after the timed runs: outside the",
    ),
    "reports flash, and runs math": (wrong(math_behind_flash), "red", "reported flash, which did not run"),
    "reports flash in each call, and runs it in one": (
        wrong(flash_in_the_first_call_only), "red", "reported flash in 8 calls, but it ran",
    ),
    "reports plain operations, and runs flash": (
        wrong(flash_behind_plain_operations), "red", "reported eager, but flash ran",
    ),
    "reports another kernel in the timed runs": (
        wrong(lambda self, a: run(a, kernel="slow" if self.count() <= 40 else "fast")), "red",
        "ran fast, which the gate did not check",
    ),
    "another backend for some calls": (OtherBackendInTheDecoder, "red", "requested 'contender', but sdpa ran"),
    "undeclared pattern": (UndeclaredPattern, "red", OUTSIDE),
    "narrow window": (NarrowWindow, "red", OUTSIDE),
    "crash": (wrong(lambda self, a: {}["no kernel"]), "failed", "KeyError: 'no kernel'"),
    "crash in the timed runs": (wrong(crash_in_the_timed_runs), "failed", "RuntimeError: the kernel fell over"),
    "wrong shape": (wrong(lambda self, a: run(a)._replace(output=run(a).output[:, :, 1:])), "failed", "Error: "),
}  # fmt: skip


@pytest.mark.parametrize(("cls", "status", "words"), WRONG.values(), ids=WRONG)
def test_contender_that_is_wrong_in_one_place_shows_no_speed(shootout, cls, status, words):
    register_backend(cls)
    result = shootout("contender", modes=("gradient" in words,), batch=2, rounds=4, original=False)
    (row,) = result.rows
    assert row.status == status and words in row.reason, row.reason
    assert_no_measurements(row)
    assert not result.ok
    if status == "red":
        cells = line_of(printed(result), "contender")
        assert cells[-1] == "RED" and "ms" not in cells and "s" not in cells


@pytest.mark.parametrize("fallbacks", [1, 3])
def test_counted_fallbacks_are_red(shootout, monkeypatch, fallbacks):
    """A row with counted fallbacks shows no speed, whether or not the fallbacks happened."""
    call = forwards.SiteAttend.__call__

    def call_and_count(self, attention, probabilities=False):
        self.site.fallbacks = fallbacks if self.site.name.endswith("1.self_attn") else 0
        return call(self, attention, probabilities)

    monkeypatch.setattr(forwards.SiteAttend, "__call__", call_and_count)
    (row,) = shootout("eager", original=False).rows
    assert row.status == "red" and f"{fallbacks} fallbacks" in row.reason and "layers.1.self_attn" in row.reason
    assert_no_measurements(row)


def test_forward_that_fell_back_is_red(shootout, monkeypatch):
    """One site runs the model's own code in the timed runs, after the warm-up and the forward of the gate."""
    run_patched = forwards.PatchedForward._run

    def run_or_fall_back(self, args, kwargs):
        if self.site.name.endswith("1.encoder_attn") and self.site.calls == 2:
            self.site.fallbacks += 1
            return self._run_original(self.module, args, kwargs)
        return run_patched(self, args, kwargs)

    monkeypatch.setattr(forwards.PatchedForward, "_run", run_or_fall_back)
    (row,) = shootout("eager", original=False, rounds=3).rows
    assert row.status == "red" and "1.encoder_attn: requested 'eager'" in row.reason, row.reason
    assert "(2 calls, 3 fallbacks)" in row.reason
    assert_no_measurements(row)


@dataclass(frozen=True)
class Flash(SdpaBackend):
    """A plug-in that calls ``scaled_dot_product_attention`` and reports a kernel name that attnzoo does not know."""

    name: ClassVar[str] = "contender"

    def run(self, attention, probabilities=False):
        return SdpaBackend().run(attention)._replace(kernel="my-kernel")


@pytest.mark.parametrize(
    ("cls", "train"), [(Contender, False), (Flash, True)], ids=["plain operations", "a plug-in's kernel"]
)
def test_right_contender_shows_a_speed(shootout, cls, train):
    register_backend(cls)
    result = shootout("contender", modes=(train,), batch=2)
    row = row_of(result, "contender", "forward+backward" if train else "forward")
    assert result.ok and row.status == "ok" and row.seconds and row.speedup and row.peak_bytes is not None
    assert row.checks > ATTENTIONS, "every attention of a forward is compared"


@pytest.mark.parametrize(
    ("reported", "ran", "lines"),
    [
        ({"flash": 2}, {"flash": 2}, []),
        ({"flash_cpu": 2, "flash": 1}, {"flash": 5}, []),
        ({"flash_cpu": 2, "flash": 1}, {"flash": 2}, ["reported flash in 3 calls, but it ran 2 times"]),
        ({"flash+math": 2}, {"flash": 2}, ["reported math, which did not run"]),
        ({"eager": 1}, {}, []),
        ({"eager": 1}, {"math": 1}, ["reported eager, but math ran"]),
        ({"eager": 1, "math": 1}, {"math": 1}, []),
        ({"tiled": 1}, {"math": 1}, []),
    ],
)
def test_witness_compares_reported_kernels_with_those_that_ran(reported, ran, lines):
    assert misreports(reported, ran) == lines
