"""No speed on a red gate, none when something else ran than was asked for, and nobody vanishes."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from attnzoo.benchmarks.report import show
from attnzoo.benchmarks.rows import Row, Shootout
from attnzoo.benchmarks.worker import Problem
from tests.benchmarks.conftest import row_of

MODES = (False, True)


def assert_silent(row: Row) -> None:
    assert row.seconds is None and row.fastest is None and row.slowest is None and row.speedup is None
    assert row.runs == () and row.peak_bytes is None and row.peak_ratio is None


def printed(found: Shootout, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width)
    show(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def line_of(text: str, backend: str) -> list[str]:
    """The row of the table that starts with a name."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [backend])


def test_right_backends_are_timed_and_compared(shootout):
    found = shootout("eager", "sdpa", modes=MODES, rounds=3)
    assert found.ok and len(found.rows) == 6
    for row in found.rows:
        assert row.status == "ok" and len(row.runs) == 3 and row.speedup is not None
        assert row.fastest <= row.seconds <= row.slowest
        if row.backend != "native":
            assert row.checks and row.error <= row.budget and row.budget > 0
    assert row_of(found, "native").speedup == 1.0
    assert row_of(found, "native").kernel == "original (eager)"
    assert row_of(found, "eager").kernel == "eager"
    assert row_of(found, "sdpa").kernel not in (None, "none", "native", "eager")
    assert any("gradient" in word for word in [row_of(found, "sdpa", "forward+backward").worst]) or (
        row_of(found, "sdpa", "forward+backward").checks > row_of(found, "sdpa").checks
    )


@pytest.mark.parametrize("scope", ["model", "module", "attention"])
def test_wrong_numbers_show_no_speed(shootout, scope):
    found = shootout("wrong", scope=scope)
    row = row_of(found, "wrong")
    assert row.status == "red" and "outside the error budget" in row.reason and row.error > row.budget
    assert_silent(row)
    assert not found.ok
    cells = line_of(printed(found), "wrong")
    assert cells[-1] == "RED" and "ms" not in cells and "s" not in cells


def test_red_end_to_end_shows_no_speed(shootout):
    found = shootout("eager", check=lambda job: (False, "logits: FAILS"))
    row = row_of(found, "eager")
    assert row.status == "red" and "end to end: logits: FAILS" in row.reason
    assert_silent(row)
    assert row_of(found, "native").seconds is not None


def test_who_refuses_gradients_end_to_end_runs_forward(shootout):
    asked = []

    def check(job):
        asked.append((job.backend, job.gradients))
        if job.gradients and job.backend == "sdpa":
            raise Problem("refused", "grad: got requested")
        return True, ""

    found = shootout("sdpa", "eager", modes=(False, True), check=check)
    assert asked == [("sdpa", True), ("sdpa", False), ("eager", True)]
    assert row_of(found, "sdpa").status == row_of(found, "eager", "forward+backward").status == "ok"
    refused = row_of(found, "sdpa", "forward+backward")
    assert refused.status == "refused" and "end to end: grad: got requested" in refused.reason
    assert "forward+backward: sdpa: refused" in printed(found) and "forward: sdpa: within" in printed(found)


def test_end_to_end_verdict_comes_from_verify(shootout):
    from attnzoo.benchmarks.worker import verify_here

    found = shootout("eager", "wrong", check=verify_here, verify_len=16)
    assert {v.backend: v.status for v in found.end_to_end} == {"eager": "ok", "wrong": "red"}
    assert "end to end" in row_of(found, "wrong").reason
    assert_silent(row_of(found, "wrong"))


@pytest.mark.parametrize(
    ("backend", "words"), [("elsewhere", "with kernel native"), ("switching", "which the gate did not judge")]
)
def test_something_else_ran(shootout, backend, words):
    found = shootout(backend)
    row = row_of(found, backend)
    assert row.status == "red" and "not what was asked for" in row.reason and words in row.reason
    assert_silent(row)


def test_another_backend_ran(shootout, monkeypatch):
    from attnzoo.patching import forwards

    eager = forwards.registry.make_backend("eager")
    monkeypatch.setattr(forwards, "execute", lambda backend, attention, *rest: eager.run(attention))
    monkeypatch.setattr(forwards.SiteAttend, "__call__", _through_eager(eager))
    row = row_of(shootout("sdpa"), "sdpa")
    assert row.status == "red" and "asked for 'sdpa', executed eager" in row.reason
    assert_silent(row)


def _through_eager(eager):
    def call(self, attention, probabilities=False):
        result = eager.run(attention, probabilities)
        self.site.kernels[result.kernel] += 1
        if self.site.observer is not None:
            self.site.observer(self.site, attention, result, eager)
        return result

    return call


def test_a_kernel_that_is_reported_and_did_not_run_is_red(shootout):
    row = row_of(shootout("pretending"), "pretending")
    assert row.status == "red" and "reported flash, which did not run" in row.reason
    assert_silent(row)


def test_calls_that_did_not_happen_are_red(shootout, monkeypatch):
    from attnzoo.patching import forwards

    def call(self, attention, probabilities=False):
        self.site.kernels["eager"] += self.site.observer is not None
        return honest(self, attention, probabilities)

    honest = forwards.SiteAttend.__call__
    monkeypatch.setattr(forwards.SiteAttend, "__call__", call)
    row = row_of(shootout("eager"), "eager")
    assert row.status == "red" and "counted 4 calls of eager, observed 2" in row.reason
    assert_silent(row)


def test_an_unreached_site_is_red(shootout, monkeypatch):
    from collections import Counter

    from attnzoo.benchmarks.contenders import BackendEntry

    def executed(self):
        self._handle.sites[-1].kernels = Counter()
        return original(self)

    original = BackendEntry.executed
    monkeypatch.setattr(BackendEntry, "executed", executed)
    row = row_of(shootout("eager"), "eager")
    assert row.status == "red" and "0 calls" in row.reason
    assert_silent(row)


def test_refusals_are_rows(shootout):
    found = shootout("forward-only", "absent", modes=MODES)
    assert row_of(found, "forward-only").status == "ok"
    refused = row_of(found, "forward-only", "forward+backward")
    assert refused.status == "refused" and "grad: got requested" in refused.reason
    absent = row_of(found, "absent")
    assert absent.status == "refused" and "pip install nowhere" in absent.reason
    for row in (refused, absent):
        assert_silent(row)
    text = printed(found)
    names = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert "absent" not in names and names.count("forward-only") == 1, "only rows with something to see"
    (line,) = [line for line in text.splitlines() if line.startswith("not run: ")]
    assert "forward-only, forward+backward (grad: got requested" in line
    assert "absent (" in text and "pip install nowhere" in text
    assert found.ok  # a refusal is an answer, not a failure


def test_every_backend_of_the_machine_is_a_row_by_default(shootout):
    from attnzoo import backends

    found = shootout()
    names = {row.backend for row in found.rows}
    assert names == {"native"} | {info.name for info in backends().values() if info.exact or not info.available}
    assert {"absent", "broken", "wrong"} <= names


def test_failures_are_rows(shootout):
    found = shootout("broken")
    row = row_of(found, "broken")
    assert row.status == "failed" and "RuntimeError: the kernel fell over" in row.reason
    assert_silent(row)
    assert not found.ok


def test_left_out_rows_say_why(shootout):
    found = shootout(seq_lens=(40, 80), dense_limit=64)
    late = {row.backend: row for row in found.rows if "beyond S=64" in row.reason}
    assert {"eager", "wrong"} <= set(late) and "sdpa" not in late, "all that say of themselves to be dense"
    assert {(row.status, row.seq_len) for row in late.values()} == {("skipped", 80)}
    assert "--backend wrong" in late["wrong"].reason


def test_a_table_of_positions_is_made_longer_and_the_row_says_so(shootout):
    for row in shootout("eager", seq_lens=(160,)).rows:
        assert row.status == "ok" and row.note == "the published configuration has 128 positions; here there are 160"
    assert {row.note for row in shootout("eager").rows} == {""}


def test_a_dense_oracle_too_large_for_the_memory_is_left_out(shootout, monkeypatch):
    from attnzoo.benchmarks import contenders

    monkeypatch.setattr(contenders, "available_memory", lambda device: 1000)
    row = row_of(shootout("eager"), "eager")
    assert row.status == "skipped" and "more than half of the free" in row.reason


def test_train_limit_is_a_row(shootout):
    found = shootout("sdpa", modes=MODES, train_limit=16)
    assert row_of(found, "sdpa").status == "ok"
    assert row_of(found, "sdpa", "forward+backward").status == "skipped"


@pytest.mark.parametrize("scope", ["module", "attention"])
def test_a_module_runs_beyond_the_position_table(shootout, scope):
    found = shootout("sdpa", scope=scope, seq_lens=(160,), modes=MODES)
    assert {row.status for row in found.rows} == {"ok"}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_tables_fit_the_terminal_and_cut_no_word(shootout, width):
    found = shootout(modes=MODES, seq_lens=(40, 80), dense_limit=64)
    narrow, wide = printed(found, width), printed(found, 1000)
    assert all(len(line.rstrip()) <= width for line in narrow.splitlines())
    assert set(narrow.split()) <= set(wide.split())
    titles = next(line.split() for line in narrow.splitlines() if line.startswith("backend"))
    assert {"backend", "kernel", "median", "speed", "memory", "gate"} <= set(titles)
    assert width < 80 or {"min", "max", "peak"} <= set(titles)


def test_what_was_not_run_says_where(shootout):
    found = shootout("sdpa", "absent", modes=MODES, seq_lens=(40, 80), train_limit=64)
    text = " ".join(printed(found).split())
    assert "original, sdpa, absent at S=80, forward+backward (forward+backward: left out beyond S=64" in text
    assert "absent (" in " ".join(printed(shootout("sdpa", "absent")).split()), "nowhere at all"


@pytest.mark.parametrize("width", [80, 120])
def test_large_numbers_fit(shootout, width):
    """Sixteen thousand tokens on a slow machine."""
    found = shootout("sdpa")
    row = replace(row_of(found, "sdpa"), kernel="flash_cpu+flash+math_blocks", backend="flash_attention_2")
    row = replace(row.timed((71.11, 72.22, 83.33)), peak_bytes=9999 << 20, peak_ratio=12.34, speedup=12.34)
    text = printed(replace(found, rows=(replace(row, seq_len=16384),)), width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert line_of(text, "flash_attention_2")[-9:-3] == ["72.22", "s", "71.1-83.3", "12.34x", "9999", "MiB"]


@pytest.fixture
def dense(monkeypatch):
    """A tiny family whose attention is dense, in place of the local one."""
    from dataclasses import replace

    from attnzoo.benchmarks.models import GPT_NEOX, WORKLOADS

    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    small = {**GPT_NEOX.published, **sizes, "max_position_embeddings": 128}
    monkeypatch.setitem(WORKLOADS, "tiny", replace(GPT_NEOX, name="tiny", published=small, heads=2, layers=2))


@pytest.mark.parametrize("scope", ["model", "attention"])
def test_who_changes_the_pattern_is_judged_with_that_and_shows_its_recall(shootout, dense, scope):
    from attnzoo.benchmarks.contenders import end_to_end

    local, hashed = "blocked-local:window=6,sinks=2", "lsh:num_hashes=2,chunk_length=8,num_buckets=4,inner=sdpa"
    found = shootout(local, hashed, "sdpa", "lsh", scope=scope, peers=False)
    for name in (local, hashed):
        row = row_of(found, name)
        assert row.status == "ok" and row.error <= row.budget and 0.1 < row.recall < 1.0
        assert end_to_end("tiny", name, 40, "float32", "cpu", False)[0]
    assert row_of(found, "sdpa").recall is None
    bare = row_of(found, "lsh")
    assert bare.status == "refused" and "no num_hashes, chunk_length, num_buckets" in bare.reason
    text = printed(found)
    assert f"{row_of(found, local).recall:.3f}" in text.split() and "recall: the backend changes" in text


def test_a_lie_about_the_changed_pattern_is_red(shootout, dense, monkeypatch):
    from attnzoo.backends.approximate.blocked_local import BlockedLocalBackend
    from attnzoo.backends.sdpa.backend import SdpaBackend

    monkeypatch.setattr(BlockedLocalBackend, "run", lambda self, attention, *_: SdpaBackend().run(attention))
    row = row_of(shootout("blocked-local:window=6"), "blocked-local:window=6")
    assert row.status == "red" and "outside the error budget" in row.reason
    assert_silent(row)


def test_options_of_a_backend_are_looked_at_before_anything_runs(shootout):
    from attnzoo import InvalidArgumentError

    with pytest.raises(InvalidArgumentError, match="did you mean 'sdpa'"):
        shootout("spda:window=3")
    with pytest.raises(InvalidArgumentError, match="name:option=value"):
        shootout("blocked-local:window")
