"""A row shows a speed only if its gate is green and the requested kernel ran. Every contender has a row."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from attnzoo import Choice, InvalidArgumentError, backends, configure
from attnzoo.auto.native import NativeChooser
from attnzoo.backends.approximate.blocked_local import BlockedLocalBackend
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.benchmarks import contenders
from attnzoo.benchmarks.contenders import PreparedBackend
from attnzoo.benchmarks.models import GPT_NEOX, WORKLOADS
from attnzoo.benchmarks.rows import Problem
from attnzoo.benchmarks.worker import EndToEndJob, verify_here
from attnzoo.patching import forwards
from tests.benchmarks.conftest import (
    MODES,
    assert_no_measurements,
    assert_red,
    line_of,
    planted,
    printed,
    row_of,
    run_plan,
)
from tests.support.uncompiled_flex import uncompiled_flex


@pytest.fixture(scope="module")
def of_every_backend():
    """Return the shootout of every backend at two lengths. The longer length is above the limit of dense backends."""
    with planted(), uncompiled_flex():
        return run_plan(modes=MODES, seq_lens=(40, 80), dense_limit=64)


def test_correct_backends_are_timed_and_compared(shootout):
    result = shootout("eager", "sdpa", modes=MODES, rounds=3)
    assert result.ok and len(result.rows) == 6
    for row in result.rows:
        assert row.status == "ok" and len(row.runs) == 3 and row.speedup is not None
        assert row.fastest <= row.seconds <= row.slowest
        if row.backend != "native":
            assert row.checks and row.error <= row.budget and row.budget > 0
    assert row_of(result, "native").speedup == 1.0
    assert row_of(result, "native").kernel == "original (eager)"
    assert row_of(result, "eager").kernel == "eager"
    assert row_of(result, "sdpa").kernel not in (None, "none", "native", "eager")
    trained = row_of(result, "sdpa", "forward+backward")
    assert "gradient" in trained.worst or trained.checks > row_of(result, "sdpa").checks


@pytest.mark.parametrize("scope", ["model", "module", "attention"])
def test_wrong_numbers_show_no_speed(shootout, scope):
    result = shootout("wrong", scope=scope)
    assert_red(result, "wrong", "outside the error budget")
    assert row_of(result, "wrong").error > row_of(result, "wrong").budget
    assert not result.ok
    cells = line_of(printed(result), "wrong")
    assert cells[-1] == "RED" and "ms" not in cells and "s" not in cells


def test_red_end_to_end_gate_shows_no_speed(shootout):
    result = shootout("eager", check=lambda job: (False, "logits: FAILS"))
    assert_red(result, "eager", "end to end: logits: FAILS")
    assert row_of(result, "native").seconds is not None


def test_backend_that_refuses_gradients_end_to_end_runs_forward(shootout):
    jobs = []

    def check(job):
        jobs.append((job.backend, job.gradients))
        if job.gradients and job.backend == "sdpa":
            raise Problem("refused", "grad: got True")
        return True, ""

    result = shootout("sdpa", "eager", modes=MODES, check=check)
    assert jobs == [("sdpa", True), ("sdpa", False), ("eager", True)]
    assert row_of(result, "sdpa").status == row_of(result, "eager", "forward+backward").status == "ok"
    refused = row_of(result, "sdpa", "forward+backward")
    assert refused.status == "refused" and "end to end: grad: got True" in refused.reason
    text = printed(result)
    assert "forward+backward: sdpa: refused" in text and "forward: sdpa: within the error budget" in text


def test_end_to_end_verdict_is_that_of_verify(shootout):
    result = shootout("eager", "wrong", check=verify_here, verify_len=16)
    assert {verdict.backend: verdict.status for verdict in result.end_to_end} == {"eager": "ok", "wrong": "red"}
    assert_red(result, "wrong", "end to end")


@pytest.mark.parametrize(
    ("backend", "words"), [("elsewhere", "with kernel native"), ("switching", "which the gate did not check")]
)
def test_unrequested_kernel_is_red(shootout, backend, words):
    assert_red(shootout(backend), backend, "not what was requested", words)


def test_unrequested_backend_is_red(shootout, monkeypatch):
    eager = forwards.registry.make_backend("eager")

    def call(self, attention, probabilities=False):
        result = eager.run(attention, probabilities)
        self.site.kernels[result.kernel] += 1
        if self.site.observer is not None:
            self.site.observer(self.site, attention, result, eager)
        return result

    monkeypatch.setattr(forwards.SiteAttend, "__call__", call)
    assert_red(shootout("sdpa"), "sdpa", "requested 'sdpa', but eager ran")


def test_reported_kernel_that_did_not_run_is_red(shootout):
    assert_red(shootout("pretending"), "pretending", "reported flash, which did not run")


def test_counted_calls_that_did_not_happen_are_red(shootout, monkeypatch):
    call = forwards.SiteAttend.__call__

    def call_and_miscount(self, attention, probabilities=False):
        self.site.kernels["eager"] += self.site.observer is not None
        return call(self, attention, probabilities)

    monkeypatch.setattr(forwards.SiteAttend, "__call__", call_and_miscount)
    assert_red(shootout("eager"), "eager", "counted 4 calls of eager, observed 2")


def test_site_without_calls_is_red(shootout, monkeypatch):
    execution = PreparedBackend.execution

    def execution_without_last_site(self):
        self._handle.sites[-1].kernels = Counter()
        return execution(self)

    monkeypatch.setattr(PreparedBackend, "execution", execution_without_last_site)
    assert_red(shootout("eager"), "eager", "0 calls")


def test_refusals_have_rows_and_do_not_fail_the_shootout(shootout):
    result = shootout("forward-only", "absent", modes=MODES)
    assert result.ok and row_of(result, "forward-only").status == "ok"
    refused = row_of(result, "forward-only", "forward+backward")
    assert refused.status == "refused" and "grad: got True" in refused.reason
    absent = row_of(result, "absent")
    assert absent.status == "refused" and "pip install nowhere" in absent.reason
    for row in (refused, absent):
        assert_no_measurements(row)
    text = printed(result)
    names = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert "absent" not in names and names.count("forward-only") == 1, "the table has no refused rows"
    (line,) = [line for line in text.splitlines() if line.startswith("not run: ")]
    assert "forward-only, forward+backward (grad: got True" in line
    assert "absent (" in text and "pip install nowhere" in text


def test_by_default_every_backend_has_a_row_and_dense_ones_stop_at_their_limit(of_every_backend):
    result = of_every_backend
    names = {row.backend for row in result.rows if row.seq_len == 40}
    assert names == {"native"} | {info.name for info in backends().values() if info.exact or not info.available}
    assert {"absent", "broken", "wrong"} <= names
    skipped = {row.backend: row for row in result.rows if "above S=64" in row.reason}
    assert {"eager", "wrong"} <= set(skipped) and "sdpa" not in skipped, "exactly the backends that declare dense"
    assert {(row.status, row.seq_len) for row in skipped.values()} == {("skipped", 80)}
    assert "--backend wrong" in skipped["wrong"].reason


def test_tables_fit_the_terminal_and_cut_no_word(of_every_backend):
    result = of_every_backend
    wide = printed(result, 1000)
    for width in (60, 80, 120):
        narrow = printed(result, width)
        assert all(len(line.rstrip()) <= width for line in narrow.splitlines())
        assert set(narrow.split()) <= set(wide.split())
        titles = next(line.split() for line in narrow.splitlines() if line.startswith("backend"))
        assert {"backend", "kernel", "median", "speed", "memory", "gate"} <= set(titles)
        assert width < 80 or {"min", "max", "peak"} <= set(titles)


def test_failures_have_rows(shootout):
    result = shootout("broken")
    row = row_of(result, "broken")
    assert row.status == "failed" and "RuntimeError: the kernel fell over" in row.reason
    assert_no_measurements(row)
    assert not result.ok


def test_dense_backend_is_skipped_if_memory_does_not_suffice(shootout, monkeypatch):
    monkeypatch.setattr(contenders, "available_memory", lambda device: 1000)
    row = row_of(shootout("eager"), "eager")
    assert row.status == "skipped" and "more than half of the free" in row.reason


def test_position_table_grows_with_a_note(shootout):
    for row in shootout("eager", seq_lens=(160,)).rows:
        assert row.status == "ok" and row.note == "the published configuration has 128 positions; here there are 160"
    assert {row.note for row in shootout("eager").rows} == {""}


def test_training_is_skipped_above_its_limit(shootout):
    result = shootout("sdpa", modes=MODES, train_limit=16)
    assert row_of(result, "sdpa").status == "ok"
    assert row_of(result, "sdpa", "forward+backward").status == "skipped"


@pytest.mark.parametrize("scope", ["module", "attention"])
def test_module_runs_at_lengths_above_the_position_table(shootout, scope):
    result = shootout("sdpa", scope=scope, seq_lens=(160,), modes=MODES)
    assert {row.status for row in result.rows} == {"ok"}


def test_table_names_lengths_and_modes_that_did_not_run(shootout):
    result = shootout("sdpa", "absent", modes=MODES, seq_lens=(40, 80), train_limit=64)
    text = " ".join(printed(result).split())
    assert "original, sdpa, absent at S=80, forward+backward (forward+backward: skipped above S=64" in text
    assert "absent (" in " ".join(printed(shootout("sdpa", "absent")).split()), "it ran nowhere"


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_with_large_numbers(plain, width):
    """The numbers are those of 16384 tokens on a slow machine."""
    row = replace(row_of(plain, "sdpa"), kernel="flash_cpu+flash+math_blocks", backend="flash_attention_2")
    row = replace(row.with_times((71.11, 72.22, 83.33)), peak_bytes=9999 << 20, peak_ratio=12.34, speedup=12.34)
    text = printed(replace(plain, rows=(replace(row, seq_len=16384),)), width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert line_of(text, "flash_attention_2")[-9:-3] == ["72.22", "s", "71.1-83.3", "12.34x", "9999", "MiB"]


@pytest.fixture
def dense(monkeypatch):
    """Make the attention of the tiny family dense instead of local."""
    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    small = {**GPT_NEOX.published, **sizes, "max_position_embeddings": 128}
    monkeypatch.setitem(WORKLOADS, "tiny", replace(GPT_NEOX, name="tiny", published=small, heads=2, layers=2))


@pytest.mark.parametrize("scope", ["model", "attention"])
def test_backend_that_changes_the_pattern_is_checked_on_it_and_shows_recall(shootout, dense, scope):
    local, hashed = "blocked-local:window=6,sinks=2", "lsh:num_hashes=2,chunk_length=8,num_buckets=4,inner=sdpa"
    result = shootout(local, hashed, "sdpa", "lsh", scope=scope, peers=False)
    for name in (local, hashed):
        row = row_of(result, name)
        assert row.status == "ok" and row.error <= row.budget and 0.1 < row.recall < 1.0
        assert verify_here(EndToEndJob("tiny", name, 40, "float32", "cpu", 1, False))[0]
    assert row_of(result, "sdpa").recall is None
    without_options = row_of(result, "lsh")
    assert without_options.status == "refused"
    assert "no value for num_hashes, chunk_length, num_buckets" in without_options.reason
    text = printed(result)
    assert f"{row_of(result, local).recall:.3f}" in text.split() and "recall: this backend sees" in text


def test_backend_that_computes_another_pattern_is_red(shootout, dense, monkeypatch):
    monkeypatch.setattr(BlockedLocalBackend, "run", lambda self, attention, *_: SdpaBackend().run(attention))
    assert_red(shootout("blocked-local:window=6"), "blocked-local:window=6", "outside the error budget")


@pytest.mark.parametrize(
    ("backend", "words"),
    [("spda:window=3", "did you mean 'sdpa'"), ("blocked-local:window", "name:option=value")],
)
def test_wrong_options_of_a_backend_raise_before_anything_runs(shootout, backend, words):
    with pytest.raises(InvalidArgumentError, match=words):
        shootout(backend)


@pytest.mark.parametrize("scope", ["model", "module"])
def test_auto_is_a_contender_wherever_it_runs(shootout, monkeypatch, scope):
    """On this tiny model the rule selects the model's code. With a lower limit, or by priority, a backend runs."""
    result = shootout("auto", scope=scope, modes=MODES)
    assert result.ok and {row.kernel for row in result.rows if row.backend == "auto"} == {"native"}
    assert all(row.seconds is not None for row in result.rows)
    monkeypatch.setenv("ATTNZOO_AUTO", "priority")
    (row,) = (row for row in shootout("auto", scope=scope).rows if row.backend == "auto")
    assert row.status == "ok" and row.checks and "native" not in row.kernel


def test_gate_of_auto_checks_the_sites_that_ran_a_backend(shootout, monkeypatch):
    """Some sites run the model's code and others a backend. A wrong backend still turns the row red."""
    original = NativeChooser.choose

    def encoder_only(self, module, args, kwargs):
        return original(self, module, args, kwargs) if "Encoder" in type(module).__name__ else None

    monkeypatch.setattr(NativeChooser, "choose", encoder_only)
    row = row_of(shootout("auto"), "auto")
    assert row.status == "ok" and row.checks and "native" in row.kernel.split("+") and row.kernel != "native"
    monkeypatch.setattr("attnzoo.auto.selection.choose_for", lambda *args: Choice(configure("wrong")))
    assert_red(shootout("auto"), "auto", "outside the error budget")


def test_gate_runs_the_forward_of_the_timed_mode(shootout, monkeypatch):
    """``auto`` may select other code with gradients than without. The gate must check the code that is timed."""
    original = NativeChooser.choose
    training = []

    def native_without_gradients(self, module, args, kwargs):
        training.append(torch.is_grad_enabled())
        return None if torch.is_grad_enabled() else original(self, module, args, kwargs)

    monkeypatch.setattr(NativeChooser, "choose", native_without_gradients)
    row = row_of(shootout("auto", modes=(True,)), "auto", "forward+backward")
    assert row.status == "ok" and row.checks and all(training)
