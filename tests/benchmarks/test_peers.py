"""Peers have rows: timed beside the backends, without a gate, and skipped with a reason if they cannot run."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

from attnzoo.benchmarks import peers, runner
from attnzoo.benchmarks.cases import Case
from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.options import make_plan
from attnzoo.benchmarks.peers import LIBRARIES, Library, PeerContender
from attnzoo.benchmarks.rows import Shootout
from attnzoo.benchmarks.runner import ShootoutPlan
from attnzoo.benchmarks.worker import Worker
from attnzoo.benchmarks.workload import Peer
from attnzoo.errors import InvalidArgumentError
from tests.benchmarks.conftest import MODES, assert_no_measurements, invoke_bench, line_of, printed, row_of
from tests.support import fake_shootout

PACKAGE, MODULE = "fake-attention", "attnzoo_fake_attention"


class FakeAttention(nn.Module):
    """A peer that returns wrong values. No gate checks peers."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        q, k, v = inputs
        return (q * k * v * float("nan")).nan_to_num(1e9) + q, None


class Crashing(FakeAttention):
    def forward(self, *inputs):
        raise RuntimeError("the peer fell over")


@pytest.fixture(autouse=True)
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the tiny family name a peer whose package is not installed."""
    monkeypatch.setitem(LIBRARIES, PACKAGE, Library(MODULE, "FakeAttention", 3, lambda options: options["block"]))
    monkeypatch.setitem(WORKLOADS, "tiny", replace(fake_shootout.TINY, peer=Peer(PACKAGE, 8, dict(block=8))))
    yield
    sys.modules.pop(MODULE, None)


@pytest.fixture
def attention(shootout: Callable[..., Shootout]) -> Callable[..., Shootout]:
    return lambda *backends, **values: shootout(*(backends or ("sdpa",)), **{"scope": "attention", **values})


def install(cls: type[nn.Module] = FakeAttention) -> None:
    module = types.ModuleType(MODULE)
    module.FakeAttention = cls  # type: ignore[attr-defined]
    sys.modules[MODULE] = module


def test_peer_is_timed_and_compared_without_a_gate(attention):
    install()
    result = attention("sdpa", "wrong", modes=MODES, rounds=2)
    for mode in ("forward", "forward+backward"):
        row, backend, original = (row_of(result, name, mode) for name in (PACKAGE, "sdpa", "native"))
        assert row.status == "ok" and len(row.runs) == 2 and row.peer, row.reason
        assert row.speedup == pytest.approx(original.seconds / row.seconds)
        assert row.peak_bytes is not None and row.memory_method
        assert row.kernel == "FakeAttention of unknown version"
        assert (row.error, row.budget, row.worst, row.checks) == (None, None, None, 0)
        assert backend.checks and not backend.peer and not original.peer
        assert row_of(result, "wrong", mode).status == "red", "backends still have a gate"
    assert PACKAGE not in {verdict.backend for verdict in result.end_to_end}
    text = printed(result)
    assert line_of(text, PACKAGE)[-1] == "peer" and line_of(text, "sdpa")[-2] == "ok" and "peer: the attention" in text
    assert all(len(line.rstrip()) <= 120 for line in text.splitlines())


def test_absent_package_has_a_row(attention):
    result = attention(modes=MODES)
    for mode in ("forward", "forward+backward"):
        row = row_of(result, PACKAGE, mode)
        assert row.status == "skipped" and row.peer
        assert f"needs the package '{PACKAGE}'" in row.reason and f"pip install {PACKAGE}" in row.reason
        assert "attnzoo[peers]" in row.reason
        assert_no_measurements(row)
        assert row_of(result, "sdpa", mode).status == "ok"
    text = printed(result)
    assert f"not run: {PACKAGE} (" in text and f"pip install {PACKAGE}" in text
    assert result.ok


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise RuntimeError('built for another torch')", "RuntimeError: built for another torch"),
        ("import attnzoo_nowhere", "ModuleNotFoundError: No module named 'attnzoo_nowhere'"),
        ("import sys; sys.exit('go away')", "SystemExit: go away"),
        ("def (", "SyntaxError"),
        ("", "has no attribute 'FakeAttention'"),
    ],
)
def test_broken_package_has_a_row(attention, tmp_path: Path, monkeypatch, source, words):
    (tmp_path / f"{MODULE}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    result = attention()
    row = row_of(result, PACKAGE)
    assert row.status == "skipped" and "cannot be imported" in row.reason and words in row.reason
    assert f"pip install {PACKAGE}" in row.reason
    assert_no_measurements(row)
    assert result.ok and row_of(result, "sdpa").status == "ok"


def test_crashing_peer_fails_only_its_row(attention):
    install(Crashing)
    result = attention()
    row = row_of(result, PACKAGE)
    assert row.status == "failed" and "RuntimeError: the peer fell over" in row.reason
    assert_no_measurements(row)
    assert row_of(result, "sdpa").speedup is not None
    assert result.ok, "peers do not count"
    assert not replace(result, rows=(replace(row, peer=False),)).ok


def test_unsupported_length_has_a_row(attention):
    install()
    row = row_of(attention(seq_lens=(44,)), PACKAGE)
    assert row.status == "skipped" and row.reason == "supports only multiples of 8 tokens"


@pytest.mark.parametrize("values", [{"scope": "model"}, {"scope": "module"}, {"peers": False}])
def test_peers_have_rows_only_in_scope_attention(attention, values):
    install()
    assert {row.backend for row in attention(**values).rows} == {"native", "sdpa"}


def test_peer_has_rows_only_for_its_family(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "other", replace(fake_shootout.TINY, name="other"))
    plan = ShootoutPlan(families=("other", "tiny"), backends=(), scope="attention")
    (contender,) = [contender for contender in plan.contenders() if contender.peer]
    assert [contender.has_row(case) for case in plan.cases()] == [case.family == "tiny" for case in plan.cases()]
    assert not any(contender.peer for contender in ShootoutPlan(families=("other",), scope="attention").contenders())


def test_planning_imports_no_peer(monkeypatch):
    monkeypatch.setattr(peers, "import_module", lambda name: pytest.fail(f"imported {name}"))
    plan = ShootoutPlan(families=("tiny",), backends=(), scope="attention")
    for case in plan.cases():
        for contender in plan.contenders():
            contender.check(case)


def test_importing_the_benchmarks_imports_no_peer():
    modules = sorted(library.module for name, library in LIBRARIES.items() if name != PACKAGE)
    code = (
        f"import sys, attnzoo.benchmarks.runner, attnzoo.cli.app; sys.exit(bool(sys.modules.keys() & set({modules})))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command_turns_peers_off(monkeypatch):
    plans: list[ShootoutPlan] = []

    def stop(plan, progress):
        plans.append(plan)
        raise typer.Exit

    monkeypatch.setattr(runner, "run", stop)
    for option in ([], ["--peers"], ["--no-peers"]):
        invoke_bench("--model", "tiny", "--scope", "attention", *option)
    assert [plan.peers for plan in plans] == [None, True, False]
    assert [any(contender.peer for contender in plan.contenders()) for plan in plans] == [True, True, False]


@pytest.mark.parametrize("scope", ["model", "module"])
def test_requested_peers_in_another_scope_raise(scope):
    with pytest.raises(InvalidArgumentError, match=f"peers: got --peers with scope '{scope}'; allowed: --scope atten"):
        make_plan(scope=scope, peers=True)
    assert not any(contender.peer for contender in make_plan(scope=scope).contenders())


def test_workloads_name_known_peers():
    packages = {workload.name: workload.peer.package for workload in WORKLOADS.values() if workload.peer is not None}
    del packages["tiny"]
    assert packages == {
        "longt5_local": "local-attention",
        "reformer": "reformer-pytorch",
        "reformer_local": "local-attention",
    }
    assert set(packages.values()) <= set(LIBRARIES)


@pytest.mark.parametrize("family", ["longt5_local", "reformer", "reformer_local"])
def test_real_peers_run(family):
    workload = WORKLOADS[family]
    assert workload.peer is not None
    name = workload.peer.package
    pytest.importorskip(LIBRARIES[name].module, exc_type=ImportError)
    case = Case(family, "attention", 512, 2, "float32", "cpu", 1, True)
    subject = PeerContender(name).prepare(case).subject
    with torch.no_grad():
        output = subject.call()
    assert output.shape == (2 * workload.heads, 512, workload.peer.dim_head) and output.isfinite().all()
    worker = Worker(PeerContender(name), case)
    assert worker.setup()[0].extra >= 0 and worker.time() > 0
    subject.step()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in subject.inputs)
