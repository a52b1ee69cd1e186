"""What a shootout leaves behind: JSON, plots, kind errors; and the subjects it builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from attnzoo.benchmarks import cli
from attnzoo.benchmarks.cases import Case, Projections, build
from attnzoo.benchmarks.measure import peak_of
from attnzoo.benchmarks.models import GPT_NEOX, LED, LONGFORMER, WORKLOADS, find_workload
from attnzoo.benchmarks.plots import draw
from attnzoo.benchmarks.rows import Row, Shootout
from attnzoo.benchmarks.runner import Plan, run
from attnzoo.benchmarks.text import book, read_tokens
from attnzoo.benchmarks.worker import LocalWorker, ProcessWorker, context
from attnzoo.errors import InvalidArgumentError, UnknownNameError
from tests.support import fake_shootout

CASE = Case("tiny", "model", 40, 1, "float32", "cpu", 1, True)


def test_json_has_every_field(shootout, tmp_path):
    found = shootout("sdpa", "absent")
    path = tmp_path / "new" / "result.json"
    found.write(path)
    data = json.loads(path.read_text())
    assert set(data) == {"plan", "versions", "end_to_end", "rows", "created", "seconds", "schema"}
    for row in data["rows"]:
        assert set(row) == {field.name for field in fields(Row)}
        assert {"torch", "transformers", "attnzoo", "python", "cpu"} <= set(row["versions"])
    row = next(row for row in data["rows"] if row["backend"] == "sdpa")
    wanted = [
        *("family", "checkpoint", "scope", "kernel", "seq_len", "batch", "dtype", "device", "threads", "mode"),
        *("seconds", "fastest", "slowest", "runs", "speedup", "peak_bytes", "peak_ratio", "memory_method"),
        *("error", "budget", "worst", "checks", "status"),
    ]
    assert all(row[name] not in (None, "", []) for name in wanted)
    assert Shootout.read(path) == found


def test_plots_are_written(shootout, tmp_path):
    found = shootout("sdpa", "wrong", modes=(False, True), seq_lens=(24, 40))
    (path,) = draw(found, tmp_path / "new" / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_plots_without_anything_to_draw(shootout, tmp_path):
    (path,) = draw(shootout("eager", seq_lens=(160,)), tmp_path / "plot.png")
    assert path.exists()


def test_missing_matplotlib_is_a_kind_message(shootout, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidArgumentError, match=r"pip install 'attnzoo\[plots\]', or --no-plot"):
        draw(shootout("eager"), tmp_path / "plot.png")


@pytest.fixture
def command(monkeypatch):
    """``attnzoo bench`` on the tiny family, in this process."""
    monkeypatch.setattr(cli, "run", lambda plan, bar: run(plan, bar, launch=LocalWorker, check=lambda job: (True, "")))
    app = typer.Typer()
    app.command()(cli.bench)
    common = ["--model", "tiny", "--seq-len", "40", "--rounds", "1", "--no-train", "--threads", "1"]
    return lambda *arguments: CliRunner().invoke(app, [*common, *arguments])


def test_the_command_writes_table_json_and_plot(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("--backend", "sdpa")
    assert result.exit_code == 0, result.output
    assert "tiny-led: whole model" in result.output and "original" in result.output
    (written,) = (tmp_path / "shootout").glob("tiny-model-*.json")
    assert written.with_suffix(".png").exists()
    assert Shootout.read(written).plan["backends"] == ["sdpa"]


def test_the_command_fails_on_red(command, tmp_path):
    result = command("--backend", "wrong", "--json", str(tmp_path / "a.json"), "--no-plot")
    assert result.exit_code == 1 and "outside the error budget" in result.output
    assert not list(tmp_path.glob("*.png"))


def test_the_command_without_matplotlib(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = command("--backend", "eager", "--json", str(tmp_path / "a.json"))
    assert result.exit_code == 0 and "attnzoo[plots]" in result.output and (tmp_path / "a.json").exists()
    result = command("--backend", "eager", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"))
    assert isinstance(result.exception, InvalidArgumentError) and not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(command, tmp_path, monkeypatch, option):
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder.png").mkdir()
    for path in ("file/below.png", "folder.png"):
        result = command(option, path)
        assert isinstance(result.exception, InvalidArgumentError) and f"{option[2:]}: got {path}" in str(
            result.exception
        )
    assert not list(tmp_path.glob("shootout/*"))


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"models": ["ledd"]}, UnknownNameError, r"model: got 'ledd' \(did you mean 'led'"),
        ({"backends": ["sdpaa"]}, UnknownNameError, "did you mean 'sdpa'"),
        ({"backends": ["lsh:num_hash=2"]}, UnknownNameError, "did you mean 'num_hashes'"),
        ({"backends": ["blocked-local:window=one"]}, InvalidArgumentError, "window of .*: got 'one'"),
        ({"backends": ["auto"]}, InvalidArgumentError, "backend: got 'auto'; allowed: backends by name"),
        ({"scope": "modul"}, UnknownNameError, "scope: got 'modul'.*did you mean"),
        ({"dtype": "int8"}, UnknownNameError, "dtype: got 'int8'.*allowed: 'bfloat16', 'float16'"),
        ({"device": "tpu"}, UnknownNameError, "device: got 'tpu'.*'cpu', 'cuda'"),
        ({"seq_lens": [0]}, InvalidArgumentError, "seq-len: got 0; allowed: an integer >= 1"),
        ({"rounds": 0}, InvalidArgumentError, "rounds: got 0"),
        ({"threads": -1}, InvalidArgumentError, "threads: got -1"),
        ({"batch": 0}, InvalidArgumentError, "batch: got 0"),
    ],
)
def test_bad_values(values, error, words):
    with pytest.raises(error, match=words):
        cli.make_plan(**values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device():
    with pytest.raises(InvalidArgumentError, match="device: got 'cuda'; allowed: 'cpu'"):
        cli.make_plan(device="cuda")


def test_plans():
    default = cli.make_plan(["led"])
    assert default.seq_lens == (1024, 2048, 4096) and default.modes == (False, True) and default.train_limit == 2048
    assert cli.make_plan(full=True).seq_lens[-1] == 16384 and cli.make_plan(full=True).train_limit is None
    assert cli.make_plan(train=True).modes == (True,) and cli.make_plan(train=True).train_limit is None
    assert cli.make_plan(train=False).modes == (False,) and cli.make_plan(dtype="bf16").dtype == "bfloat16"


def test_a_row_has_a_process_of_its_own():
    plan = Plan(families=("tiny",), backends=(), seq_lens=(40,), modes=(False,), rounds=2)
    made, random = context(["transformers.models.led.modeling_led"]), torch.get_rng_state()
    found = run(
        plan,
        launch=lambda contender, case: ProcessWorker(made, contender, case),
        contenders=(fake_shootout.TinyOriginal(), fake_shootout.Exiting("suicidal")),
    )
    original, dead = found.rows
    assert original.status == "ok" and len(original.runs) == 2, original.reason
    assert dead.status == "failed" and "exit code 3" in dead.reason and dead.seconds is None
    assert torch.equal(torch.get_rng_state(), random), "nor is anything drawn here"


_NOISY = """
from attnzoo.benchmarks.worker import Verify, context, verify_in_process

job = Verify("tiny", "sdpa", 16, "float32", "cpu", 1, False)
print(verify_in_process(context(["tests.support.noisy"]), job))
"""


def test_worker_processes_leave_nothing_on_stderr():
    """No start and stop of PyTorch's profiler, no semaphore that was left behind."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("KINETO_LOG_LEVEL", None)
    ran = subprocess.run([sys.executable, "-c", _NOISY], capture_output=True, text=True, env=environment, timeout=300)
    assert (ran.stdout, ran.stderr) == ("(True, '')\n", "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is Linux's")
def test_peak_memory_is_that_of_the_run():
    torch.ones(200 << 18).sum()  # 200 MiB, before: not the run's

    def allocate() -> None:
        torch.ones(64 << 18).sum()  # 64 MiB

    peak = peak_of(allocate, "cpu")
    assert 60 << 20 <= peak.extra <= 100 << 20


_FREED = """
import torch
from attnzoo.benchmarks.measure import peak_of

large = torch.ones(31 << 18)
del large  # glibc now keeps tensors of up to 31 MiB in its heap

def allocate():
    kept = [torch.ones(4 << 18) for _ in range(16)]
    del kept[::2]  # holes of 4 MiB each
    kept += [torch.ones(5 << 18) for _ in range(6)]  # which these do not fit into

print(peak_of(allocate, "cpu").extra)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak cannot be reset")
def test_memory_that_was_freed_is_not_in_the_peak():
    """In a process of its own, as rows are measured: what a long test run leaves behind is not this run's."""
    ran = subprocess.run([sys.executable, "-c", _FREED], capture_output=True, text=True, check=True)
    assert int(ran.stdout) <= 72 << 20  # 16 x 4 MiB, of which 8 made room


def test_the_text_is_long_and_read_as_bytes():
    longest = max(workload.published.get(workload.positions, 0) for workload in WORKLOADS.values())
    assert len(book()) >= 4 * (longest + 1), "four passages without a repetition"
    tokens = read_tokens(2, 100, 4)
    assert bytes((tokens.flatten() - 4).tolist()) == book()[:200]


@pytest.mark.parametrize("workload", [LED, LONGFORMER, GPT_NEOX], ids=lambda workload: workload.name)
def test_published_configurations_build(workload):
    model = find_workload(workload.name).build(layers=1)
    assert sum(type(module).__name__ == workload.attention for module in model.modules()) == 1
    unknown = set(workload.published) - set(model.config.to_dict()) - {"rotary_pct", "rotary_emb_base"}
    assert not unknown
    inputs = workload.read(2, 100)
    assert inputs.kwargs["input_ids"].shape == (2, 100) and inputs.targets.shape[0] == 2


def test_longformer_reads_as_many_tokens_as_it_has_positions_for():
    """Two rows of its table come before the first token's."""
    assert LONGFORMER.beyond(4096) is None
    assert "4096 positions" in str(LONGFORMER.beyond(4097))
    assert LONGFORMER.build(layers=1, seq_len=4097).config.max_position_embeddings == 4099


def test_subjects_are_the_same_everywhere_and_far_from_uniform():
    first, second = build(CASE), build(CASE)
    for (name, one), (_, two) in zip(first.module.named_parameters(), second.module.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    sharpest: list[float] = []

    def observe(site, attention, result, ran):
        weights = ran.run(attention, True).probabilities[0]
        sharpest.append(float(weights.amax(-1).mean()))

    for site in first.patch("eager").sites:
        site.observer = observe
    first.forward()
    assert max(sharpest) > 0.4  # uniform over a window of 9 would be 0.11


def test_backward_reaches_inputs_and_parameters():
    subject = build(Case("tiny", "module", 40, 1, "float32", "cpu", 1, True))
    subject.step()
    (states,) = subject.inputs
    assert states.grad is not None and float(states.grad.abs().max()) > 0
    assert all(parameter.grad is not None for parameter in subject.module.parameters())
    subject.clear()
    assert states.grad is None and all(parameter.grad is None for parameter in subject.module.parameters())


def test_projections_are_those_of_the_module():
    subject = build(Case("tiny", "attention", 40, 1, "float32", "cpu", 1, True))
    projections = Projections(subject)
    assert len(projections._calls) == 6  # query, key, value, each also for global tokens
    projections.step()
    projections.clear()
    assert all(parameter.grad is None for parameter in subject.module.parameters())


@pytest.mark.parametrize("family", ["tiny", "reformer", "reformer_local"])
@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward+backward"])
def test_states_get_gradients_in_training_and_in_its_projections(family, train):
    # Reversible layers run without gradients until the way back, so that their states do not look it.
    subject = build(Case(family, "attention", 512, 1, "float32", "cpu", 1, train))
    assert [states.ndim for states in subject.inputs] == ([3] if train else [])
    assert {x.requires_grad for *_, x in Projections(subject)._calls} == {train}
    subject.step()
    assert all((states.grad != 0).any() for states in subject.inputs)


def test_projections_of_a_patched_module_are_those_it_really_runs():
    """Query, key and value, and the same three for global tokens, of which there is one."""
    subject = build(Case("tiny", "attention", 40, 1, "float32", "cpu", 1, False))
    subject.patch("sdpa")
    assert len(Projections(subject)._calls) == 6
