"""Backends are timed in turns, and ``auto`` never selects a wrong one."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo.auto import selection
from attnzoo.backends.eager import EagerBackend
from attnzoo.registry import registry
from attnzoo.tuning import race
from tests.support.fake_clock import CAN_ALL
from tests.support.models import gpt_neox
from tests.support.tuning import attention, measured, took, tune


def test_time_is_a_median_without_the_first_run(add, clock):
    """Compilation in the first run, and some slow runs, do not change the time."""
    add("even", seconds=3.0)
    add("uneven", costs=[1000.0] * 3 + [2.0, 50.0, 2.0, 2.0, 50.0, 2.0, 2.0])
    (measurement,) = tune(clock, rounds=7)
    assert measurement.ranking() == [(2.0, "uneven"), (3.0, "even")]
    assert took().reason == "measured 2 s (its first run took 1000 s); even 3 s", "what it costs a new process"
    assert str(tune(clock)).count("its first run took 1000 s") == 1


def test_backends_take_turns_in_each_round(add, clock):
    order = []
    for name in ("first", "second"):
        cls = add(name, seconds=1.0)
        run = cls.run
        cls.run = lambda self, *args, _run=run, _name=name: (order.append(_name), _run(self, *args))[1]
    race.race(attention(), [cls() for cls in registry.backend_classes()], grad=False, rounds=3, clock=clock)
    assert order[-6:] == ["first", "second"] * 3


def test_sample_of_a_short_run_has_several_runs(add, clock, many_runs):
    cls = add("short", seconds=2**-9)
    outcomes = race.race(attention(), [cls()], grad=False, rounds=2, clock=clock)
    assert outcomes["short"].seconds == 2**-9
    assert len(cls.runs) == 3 + 2 * 3, "checked twice, warmed up, then two samples of at least 5 ms"


def test_much_slower_backend_is_timed_once(add, clock):
    fast, slow = add("fast", seconds=1.0), add("slow", seconds=100.0)
    outcomes = race.race(attention(), [fast(), slow()], grad=False, rounds=7, clock=clock)
    assert outcomes["slow"].seconds == 100.0
    assert (len(fast.runs), len(slow.runs)) == (3 + 7, 3 + 1)


def test_backward_counts_with_gradients(add, clock):
    add("forward", seconds=1.0, backward=9.0), add("both", seconds=2.0, backward=2.0)
    model = gpt_neox()
    (inference,) = tune(clock, model)
    (training,) = tune(clock, model.train())
    assert inference.ranking() == [(1.0, "forward"), (2.0, "both")]
    assert training.ranking() == [(4.0, "both"), (10.0, "forward")]
    assert (inference.mode, training.mode) == ("forward", "forward+backward")
    (evaluating,) = tune(clock, model.eval(), gradients=True)
    assert evaluating == training, "gradients do not depend on the mode of the model"


def test_wrong_output_is_reported_and_never_selected(add, clock):
    add("right", seconds=5.0), add("wrong", seconds=0.1, rank=9, spoils=lambda output: output * 1.01)
    (measurement,) = tune(clock)
    assert measurement.ranking() == [(5.0, "right")]
    assert "output: error" in measurement.outcomes["wrong"].reason and "FAILS" in str(tune(clock))
    assert took().backend.name == "right"


def test_wrong_gradients_count_with_gradients(add, clock):
    add("right"), add("wrong", rank=9, spoils=lambda output: output.detach() + 0.5 * (output - output.detach()))
    model = gpt_neox()
    (inference,), (training,) = tune(clock, model), tune(clock, model, gradients=True)
    assert len(inference.ranking()) == 2 and "gradient: error" in training.outcomes["wrong"].reason


def test_backend_that_raises_is_reported_and_never_selected(add, clock):
    add("broken", rank=-1, raises=RuntimeError("no such kernel\nlong trace")), add("sound")
    (measurement,) = tune(clock)
    assert measurement.outcomes["broken"].reason == "raised RuntimeError: no such kernel"
    assert took().backend.name == "sound"


def out_of_memory():
    """The error that torch raises on the CPU."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), out_of_memory()], ids=lambda error: type(error).__name__
)
def test_backend_that_ran_out_of_memory_is_not_wrong(add, clock, error):
    """Such a backend has a reason and no time. ``auto`` still selects it if no other backend is left."""
    add("full", rank=-1, raises=error), add("wrong", spoils=lambda output: output * 1.01)
    (measurement,) = tune(clock)
    assert measurement.outcomes["full"].reason.startswith(f"raised {type(error).__name__}")
    assert not measurement.outcomes["full"].wrong and measurement.outcomes["wrong"].wrong
    with pytest.raises(type(error)):
        took()


@pytest.mark.parametrize(
    ("error", "wrong"), [(torch.OutOfMemoryError("CUDA"), False), (RuntimeError("no"), True)], ids=["memory", "other"]
)
@pytest.mark.parametrize("after", [3, 4, 6])
def test_backend_that_raises_while_it_is_timed_does_not_stop_the_others(add, clock, error, wrong, after):
    add("sound", seconds=2.0)
    cls = add("late", seconds=1.0)
    run = cls.run

    def failing(self, *args):
        if len(cls.runs) >= after:
            raise error
        return run(self, *args)

    cls.run = failing
    (measurement,) = tune(clock)
    assert measurement.ranking() == [(2.0, "sound")]
    assert measurement.outcomes["late"].reason.startswith(f"raised {type(error).__name__}")
    assert measurement.outcomes["late"].wrong == wrong


def test_auto_refuses_with_reasons_if_every_backend_is_wrong(add):
    add("one"), add("two"), add("three", grad=False, dtypes=frozenset({torch.float64}))
    measured(attention(), {"one": "output: error 1", "two": "raised OSError"})
    with pytest.raises(attnzoo.BackendRefusedError) as caught:
        selection.choose_for(attention())
    for line in ("measured: got output: error 1; allowed: ", "measured: got raised OSError", "dtype: got float32"):
        assert line in str(caught.value)


def test_interrupt_stores_nothing(add, clock):
    add("sound", rank=9), add("stopped", raises=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tune(clock)
    assert took().reason.startswith("by priority")


def test_only_exact_supporting_backends_without_required_options_are_timed(add, clock):
    add("one"), add("two")
    outside = [add("approximate", exact=False), add("narrow", dtypes=frozenset({torch.float64}))]

    @attnzoo.register_backend
    @dataclass(frozen=True)
    class Needy(attnzoo.Backend):
        window: int
        name: ClassVar[str] = "needy"
        capabilities: ClassVar[attnzoo.Capabilities] = CAN_ALL

    (measurement,) = tune(clock)
    assert set(measurement.outcomes) == {"one", "two"}
    assert [cls.runs for cls in outside] == [[], []]


def test_dense_backend_that_needs_too_much_memory_is_not_timed(add, clock, monkeypatch):
    add("blocked", seconds=5.0)
    dense = add("dense", seconds=1.0, rank=9)
    dense.dense = True
    (measurement,) = tune(clock)
    assert measurement.ranking()[0] == (1.0, "dense")
    monkeypatch.setattr(race, "DENSE_BYTES", race.dense_bytes(attention(21, batch=1), grad=False) - 1)
    dense.runs.clear()
    (measurement,) = tune(clock, again=True)
    assert len(dense.runs) == 2, "the two layers of the model ran it; it was not timed"
    assert "GiB for dense scores" in measurement.outcomes["dense"].reason
    assert took().backend.name == "blocked"
    assert EagerBackend.dense and not attnzoo.Backend.dense


def test_dense_bytes_count_score_grids():
    assert race.dense_bytes(attention(64, batch=1), grad=False) == 2 * 64 * 64 * 4 * 6
    assert race.dense_bytes(attention(64, batch=2), grad=True) == 2 * 2 * 64 * 64 * 4 * 10


def raced(*classes, grad=False, rounds=5, clock=None, **changes):
    inputs = attention(grad=grad, **changes)
    return race.race(inputs, [cls() for cls in classes], grad=grad, rounds=rounds, clock=clock)


def test_times_belong_to_their_backend(add, clock):
    """Every backend has other samples, and neither the first nor the smallest sample is the median."""
    samples = {"a": [5.0, 1.0, 4.0, 2.0, 3.0], "b": [4.0, 3.5, 8.0, 9.0, 2.0], "c": [6.0, 7.0, 1.0, 0.5, 2.0]}
    classes = [add(name, costs=[20.0 + number, 30.0, 40.0, *samples[name]]) for number, name in enumerate(samples)]
    outcomes = raced(*classes, clock=clock)
    assert {name: outcome.seconds for name, outcome in outcomes.items()} == {"a": 3.0, "b": 4.0, "c": 2.0}
    assert {name: outcome.first for name, outcome in outcomes.items()} == {"a": 20.0, "b": 21.0, "c": 22.0}
    assert {name: outcome.kernel for name, outcome in outcomes.items()} == {name: f"{name}-kernel" for name in samples}


def test_samples_of_short_runs_have_their_own_number_of_runs(add, clock, many_runs):
    shortest, short, long = add("shortest", seconds=2**-11), add("short", seconds=2**-10), add("long", seconds=2**-6)
    outcomes = raced(shortest, short, long, rounds=1, clock=clock)
    assert {name: outcome.seconds for name, outcome in outcomes.items()} == {
        "shortest": 2**-11, "short": 2**-10, "long": 2**-6,
    }  # fmt: skip
    assert [len(cls.runs) for cls in (shortest, short, long)] == [3 + 11, 3 + 6, 3 + 1], "at least 5 ms per sample"


def only(*index, by=1.01):
    """Return a function that spoils the part of an output ``(batch, heads, q_len, value_dim)`` at an index."""

    def spoil(output):
        factors = torch.ones_like(output)
        factors[index] = by
        return output * factors

    return spoil


WRONG = {
    "one row": only(slice(None), slice(None), 18),
    "the last row": only(slice(None), slice(None), -1),
    "one head": only(slice(None), 1),
    "one sample": only(1),
    "one value": only(1, 0, 20, 2),
    "NaN in one row": only(0, 0, 5, by=float("nan")),
    "infinity in the last row": only(0, 0, -1, by=float("inf")),
    "a wrong shape": lambda output: output[:, :, :-1],
    "in half precision": lambda output: output.bfloat16().to(output.dtype),
    "zeros": torch.zeros_like,
    "only with gradients": lambda output: output * (1.01 if output.requires_grad else 1.0),
    "only gradients": lambda output: output.detach() + 1.01 * (output - output.detach()),
    "gradients of zero": lambda output: output.detach() + 0.0 * output,
}


@pytest.mark.parametrize("spoils", WRONG.values(), ids=WRONG)
def test_backend_that_is_wrong_in_one_place_is_not_timed(add, clock, spoils):
    slow = add("slow", seconds=50.0)
    wrong = add("wrong", seconds=0.01, rank=9, spoils=spoils)
    outcomes = raced(wrong, slow, grad=True, rounds=1, clock=clock)
    assert outcomes["wrong"].wrong and outcomes["wrong"].seconds is None and outcomes["wrong"].reason
    assert outcomes["slow"].seconds == 50.0 and not outcomes["slow"].wrong
    assert len(wrong.runs) <= 2, "it ran once and was checked once"


def test_backend_that_rewrites_without_declaring_a_change_is_wrong(add, clock):
    """The oracle computes the requested attention, because the backend claims to be exact."""
    cls = add("narrow", seconds=0.01)
    run = cls.run
    cls.rewrite = lambda self, whole, decisions=None: whole.with_tensors(tuple(t * 0.9 for t in whole.tensors()))
    cls.run = lambda self, whole, *args: run(self, self.rewrite(whole), *args)
    assert raced(cls, clock=clock)["narrow"].wrong


@pytest.mark.parametrize("rounds", [1, 4])
def test_tune_times_as_many_rounds_as_requested(add, clock, rounds):
    add("chosen", rank=9)
    cls = add("other")
    tune(clock, rounds=rounds)
    assert len(cls.runs) == 3 + rounds
