"""The agenda: its order, the plans of its shootouts, and each kind of item on a tiny model."""

from __future__ import annotations

import gc
import sys
from functools import partial

import pytest
import torch

from attnzoo.benchmarks.gpu import rows as rows_module
from attnzoo.benchmarks.gpu.agenda import agenda
from attnzoo.benchmarks.gpu.calls import calls
from attnzoo.benchmarks.gpu.correctness import attentions, models
from attnzoo.benchmarks.gpu.results import read, together, write
from attnzoo.benchmarks.gpu.rows import rows
from attnzoo.benchmarks.gpu.settings import Settings
from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.runner import ShootoutPlan
from tests.support import fake_shootout

TINY, FULL = Settings("cpu", tiny=True), Settings("cuda")


@pytest.fixture
def only_tiny(monkeypatch):
    """Make the tiny family the only family."""
    for name in list(WORKLOADS):
        monkeypatch.delitem(WORKLOADS, name)
    monkeypatch.setitem(WORKLOADS, "tiny", fake_shootout.TINY)


@pytest.fixture
def backends(monkeypatch):
    """Choose the backends of all items."""
    return lambda *names: monkeypatch.setattr(Settings, "backends", lambda self: names)


@pytest.fixture
def kept(tmp_path):
    """Run an item, write each of its results, and return what was read back after each step."""

    def run(item, **options):
        steps = []

        def keep(results):
            write(tmp_path / "item.json", results)
            steps.append(read((tmp_path / "item.json").read_text()))

        item(TINY, keep, **options)
        return steps

    return run


def test_most_important_comes_first_and_names_are_unique():
    names = [item.name for item in agenda(FULL)]
    assert len(set(names)) == len(names)
    assert names[0] == "attentions" and names[1] == "module-led-16384" and names[-1] == "tests"
    kinds = ("module", "attention-", "calls", "model-", "decode", "models", "tests")
    firsts = [next(name for name in names if name.startswith(kind)) for kind in kinds]
    assert firsts == sorted(firsts, key=names.index)
    for scope, lengths in dict(module=("16384", "4096-65536"), attention=("16384", "4096-65536"),
                               model=("512-4096-16384",)).items():  # fmt: skip
        assert {f"{scope}-{family}-{some}" for family in WORKLOADS for some in lengths} <= set(names)
    assert all(0 < item.estimate <= item.limit for settings in (FULL, TINY) for item in agenda(settings))


def test_tiny_agenda_has_every_kind_of_item():
    kinds = [{_kind(item) for item in agenda(settings)} for settings in (FULL, TINY)]
    assert kinds[0] == kinds[1]


def _kind(item):
    run = item.run
    return (run.func, run.keywords.get("scope")) if isinstance(run, partial) else (run, None)


def test_plans_of_all_shootouts_are_valid_on_a_card(monkeypatch, backends):
    """A mistake in a plan would only show on somebody's card."""
    backends("sdpa", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plans = []
    monkeypatch.setattr(rows_module, "load_models", lambda families: None)  # imports that use the card
    monkeypatch.setattr(rows_module, "run", lambda plan, **rest: plans.append(plan))
    for item in agenda(FULL):
        if getattr(item.run, "keywords", {}).get("scope"):
            item.run(FULL, lambda results: None)
    assert len(plans) == 5 * len(WORKLOADS) + 1
    assert {plan.scope for plan in plans} == {"module", "attention", "model", "decode"}
    for plan in plans:
        assert isinstance(plan, ShootoutPlan)
        assert (plan.dtype, plan.device, plan.verify_len, plan.rounds) == ("bfloat16", "cuda", None, 7)
        assert plan.modes == ((False,) if plan.scope == "decode" else (False, True))
        names = [contender.name for contender in plan.contenders()]
        assert names[0] == "native" and {"sdpa", "auto"} <= set(names)
        assert ("FA2 window" in names) == (plan.scope == "attention")


def test_backends_are_exact_and_sparse_and_auto_is_last():
    names = TINY.backends()
    assert names[0] == "sdpa" and names[-1] == "auto"
    assert not {"eager", "lsh", "blocked-local", "flex_attention"} & set(names), "flex compiles"


def test_reduced_workloads_keep_their_names(monkeypatch):
    before = dict(WORKLOADS)
    for name, workload in before.items():
        monkeypatch.setitem(WORKLOADS, name, workload)
    Settings("cuda").prepare()
    assert before == WORKLOADS
    TINY.prepare()
    assert WORKLOADS.keys() == before.keys()
    for name, workload in WORKLOADS.items():
        model = workload.build()
        assert sum(parameter.numel() for parameter in model.parameters()) < 200_000, name
        assert type(model).__name__ in workload.model_class and "(reduced)" in workload.checkpoint


def test_a_collection_before_a_timed_run_visits_no_code_of_models(monkeypatch, backends):
    backends("sdpa")
    visited = []
    monkeypatch.setattr(rows_module, "run", lambda plan, **rest: visited.append(len(gc.get_objects())))
    gc.unfreeze()
    before = len(gc.get_objects())
    rows(TINY, lambda results: None, families=("led",), scope="module", seq_lens=(24,))
    assert "transformers.models.led.modeling_led" in sys.modules and visited[0] < before / 100


def test_rows_are_kept_after_each_case(kept, backends):
    backends("sdpa", "wrong", "auto")
    steps = kept(rows, families=("tiny",), scope="module", seq_lens=(24, 40), modes=(False,))
    assert [len(step.shootouts[0].rows) for step in steps] == [4, 8]
    status = {row.backend: row.status for row in steps[-1].shootouts[0].rows}
    assert status == {"native": "ok", "sdpa": "ok", "wrong": "red", "auto": "ok"}
    assert steps[-1].shootouts[0].end_to_end == ()


def test_sample_of_the_kit_finds_wrong_numbers(kept, backends):
    backends("sdpa", "wrong", "auto")
    steps = kept(attentions, seconds=0.6)
    assert [verdict.what for verdict in steps[0].verdicts] == ["sdpa: conformance kit"]
    *wrong, summary = steps[1].verdicts[1:]
    assert wrong and all(verdict.status == "red" for verdict in (*wrong, summary))
    assert steps[0].verdicts[0].status == "ok" and "of 1" in summary.detail and ", 0 failed" not in summary.detail


def test_whole_models_have_a_verdict_per_backend(kept, backends, only_tiny):
    backends("sdpa", "wrong", "forward-only", "auto")
    steps = kept(models, seq_len=24)
    assert [len(step.verdicts) for step in steps] == [1, 2, 3, 4]
    assert [verdict.status for verdict in steps[-1].verdicts] == ["ok", "red", "refused", "ok"]
    assert steps[-1].verdicts[0].what == "tiny, whole model: sdpa"


def test_calls_are_counted_for_each_mode(kept, backends, only_tiny):
    backends("sdpa", "broken", "absent")
    *_, step = kept(calls, seq_len=24)
    assert [(call.backend, call.mode) for call in step.calls] == [
        *(("native", "forward"), ("native", "forward+backward")),
        *(("sdpa", "forward"), ("sdpa", "forward+backward")),
    ]
    assert all(call.host_seconds > 0 and call.launches is None and call.synchronisations == 0 for call in step.calls)
    assert [verdict.what for verdict in step.verdicts] == [
        *("tiny, one call, forward: broken", "tiny, one call, forward+backward: broken"),
    ], "absent is refused, which is no fault"
    assert together([step, step]).calls == step.calls * 2
