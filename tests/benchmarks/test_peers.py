"""Peers are rows: timed beside ours, judged by nobody, and left out with a reason where they cannot run."""

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
from typer.testing import CliRunner

from attnzoo.benchmarks import cli, peers
from attnzoo.benchmarks.cases import Case
from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.peers import LIBRARIES, Library, PeerContender
from attnzoo.benchmarks.rows import Shootout
from attnzoo.benchmarks.runner import Plan
from attnzoo.benchmarks.worker import LocalWorker
from attnzoo.benchmarks.workload import Peer
from attnzoo.errors import InvalidArgumentError
from tests.benchmarks.conftest import row_of
from tests.benchmarks.test_gates import MODES, assert_silent, line_of, printed
from tests.support import fake_shootout

PACKAGE, MODULE = "fake-attention", "attnzoo_fake_attention"


class FakeAttention(nn.Module):
    """Takes q, k, v; its numbers are nonsense, which nobody may judge."""

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
    """The tiny family names a peer; its package is not there yet."""
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


def test_a_peer_is_timed_compared_and_not_judged(attention):
    install()
    found = attention("sdpa", "wrong", modes=MODES, rounds=2)
    for mode, mine in (("forward", "sdpa"), ("forward+backward", "sdpa")):
        row, ours, original = (row_of(found, name, mode) for name in (PACKAGE, mine, "native"))
        assert row.status == "ok" and len(row.runs) == 2 and row.peer, row.reason
        assert row.speedup == pytest.approx(original.seconds / row.seconds)
        assert row.peak_bytes is not None and row.memory_method
        assert row.kernel == "FakeAttention of unknown version"
        assert (row.error, row.budget, row.worst, row.checks) == (None, None, None, 0)
        assert ours.checks and not ours.peer and not original.peer
        assert row_of(found, "wrong", mode).status == "red"  # the gate is there, for ours
    assert PACKAGE not in {verdict.backend for verdict in found.end_to_end}
    text = printed(found)
    assert line_of(text, PACKAGE)[-1] == "peer" and line_of(text, "sdpa")[-2] == "ok" and "peer: another" in text
    assert all(len(line.rstrip()) <= 120 for line in text.splitlines())


def test_an_absent_package_is_a_row(attention):
    found = attention(modes=MODES)
    for mode in ("forward", "forward+backward"):
        row = row_of(found, PACKAGE, mode)
        assert row.status == "skipped" and row.peer
        assert f"needs the package '{PACKAGE}'" in row.reason and f"pip install {PACKAGE}" in row.reason
        assert "attnzoo[peers]" in row.reason
        assert_silent(row)
        assert row_of(found, "sdpa", mode).status == "ok"
    text = printed(found)
    assert f"not run: {PACKAGE} (" in text and f"pip install {PACKAGE}" in text
    assert found.ok


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
def test_a_broken_package_is_a_row(attention, tmp_path: Path, monkeypatch, source, words):
    (tmp_path / f"{MODULE}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = attention()
    row = row_of(found, PACKAGE)
    assert row.status == "skipped" and "cannot be imported" in row.reason and words in row.reason
    assert f"pip install {PACKAGE}" in row.reason
    assert_silent(row)
    assert found.ok and row_of(found, "sdpa").status == "ok"


def test_a_crashing_peer_spoils_its_own_row_only(attention):
    install(Crashing)
    found = attention()
    row = row_of(found, PACKAGE)
    assert row.status == "failed" and "RuntimeError: the peer fell over" in row.reason
    assert_silent(row)
    assert row_of(found, "sdpa").speedup is not None
    assert found.ok  # not our verdict
    assert not replace(found, rows=(replace(row, peer=False),)).ok


def test_a_length_the_peer_does_not_take_is_a_row(attention):
    install()
    row = row_of(attention(seq_lens=(44,)), PACKAGE)
    assert row.status == "skipped" and row.reason == "takes multiples of 8 tokens only"


@pytest.mark.parametrize("values", [{"scope": "model"}, {"scope": "module"}, {"peers": False}])
def test_peers_are_listed_in_scope_attention_only(attention, values):
    install()
    assert {row.backend for row in attention(**values).rows} == {"native", "sdpa"}


def test_a_peer_stands_beside_its_own_family_only(monkeypatch):
    other = replace(fake_shootout.TINY, name="other")
    monkeypatch.setitem(WORKLOADS, "other", other)
    plan = Plan(families=("other", "tiny"), backends=(), scope="attention")
    (contender,) = [contender for contender in plan.contenders() if contender.peer]
    assert [contender.listed(case) for case in plan.cases()] == [case.family == "tiny" for case in plan.cases()]
    assert not any(contender.peer for contender in Plan(families=("other",), scope="attention").contenders())


def test_only_a_worker_imports_a_peer(monkeypatch):
    def tripwire(name):
        raise AssertionError(f"imported {name}")

    monkeypatch.setattr(peers, "import_module", tripwire)
    plan = Plan(families=("tiny",), backends=(), scope="attention")
    for case in plan.cases():
        for contender in plan.contenders():
            contender.obstacle(case)


def test_importing_the_benchmarks_imports_no_peer():
    modules = sorted(library.module for name, library in LIBRARIES.items() if name != PACKAGE)
    code = f"import sys, attnzoo.benchmarks.cli; sys.exit(bool(sys.modules.keys() & set({modules})))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_turns_peers_off(monkeypatch):
    plans: list[Plan] = []

    def note(plan):
        plans.append(plan)
        raise typer.Exit

    monkeypatch.setattr(cli, "_run", note)
    app = typer.Typer()
    app.command()(cli.bench)
    for option in ([], ["--peers"], ["--no-peers"]):
        CliRunner().invoke(app, ["--model", "tiny", "--scope", "attention", *option])
    assert [plan.peers for plan in plans] == [None, True, False]
    assert [any(c.peer for c in plan.contenders()) for plan in plans] == [True, True, False]


@pytest.mark.parametrize("scope", ["model", "module"])
def test_peers_that_are_asked_for_in_another_scope_are_refused(scope):
    with pytest.raises(InvalidArgumentError, match=f"peers: got --peers with scope '{scope}'; allowed: --scope atten"):
        cli.make_plan(scope=scope, peers=True)
    assert not any(contender.peer for contender in cli.make_plan(scope=scope).contenders())


def test_workloads_name_known_peers():
    named = {workload.name: workload.peer.package for workload in WORKLOADS.values() if workload.peer is not None}
    del named["tiny"]
    assert named == {
        "longt5_local": "local-attention",
        "reformer": "reformer-pytorch",
        "reformer_local": "local-attention",
    }
    assert set(named.values()) <= set(LIBRARIES)


@pytest.mark.parametrize("family", ["longt5_local", "reformer", "reformer_local"])
def test_the_real_peers_run(family):
    workload = WORKLOADS[family]
    assert workload.peer is not None
    name = workload.peer.package
    pytest.importorskip(LIBRARIES[name].module, exc_type=ImportError)
    case = Case(family, "attention", 512, 2, "float32", "cpu", 1, True)
    entry = PeerContender(name).prepare(case)
    with torch.no_grad():
        output = entry.subject.call()
    assert output.shape == (2 * workload.heads, 512, workload.peer.dim_head) and output.isfinite().all()
    worker = LocalWorker(PeerContender(name), case)
    assert worker.setup().peak.extra >= 0 and worker.time() > 0
    entry.subject.step()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in entry.subject.inputs)
