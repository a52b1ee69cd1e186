"""``attnzoo bench``: its options, its plan, and the JSON and PNG files that it writes."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from attnzoo.benchmarks import runner
from attnzoo.benchmarks.options import make_plan
from attnzoo.benchmarks.plots import draw
from attnzoo.benchmarks.rows import Row, Shootout
from attnzoo.benchmarks.runner import run
from attnzoo.benchmarks.worker import Worker
from attnzoo.errors import InvalidArgumentError, UnknownNameError
from tests.benchmarks.conftest import invoke_bench


def test_json_has_every_field(shootout, tmp_path):
    result = shootout("sdpa", "absent")
    path = tmp_path / "new" / "result.json"
    result.write(path)
    data = json.loads(path.read_text())
    assert set(data) == {"plan", "versions", "end_to_end", "rows", "created", "seconds", "schema"}
    for row in data["rows"]:
        assert set(row) == {field.name for field in fields(Row)}
        assert {"torch", "transformers", "attnzoo", "python", "cpu"} <= set(row["versions"])
    row = next(row for row in data["rows"] if row["backend"] == "sdpa")
    filled = [
        *("family", "checkpoint", "scope", "kernel", "seq_len", "batch", "dtype", "device", "threads", "mode"),
        *("seconds", "fastest", "slowest", "runs", "speedup", "peak_bytes", "peak_ratio", "memory_method"),
        *("error", "budget", "worst", "checks", "status"),
    ]
    assert all(row[name] not in (None, "", []) for name in filled)
    assert Shootout.read(path) == result


def test_plots_are_written(shootout, tmp_path):
    result = shootout("sdpa", "wrong", modes=(False, True), seq_lens=(24, 40))
    (path,) = draw(result, tmp_path / "new" / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_plots_are_written_without_an_error_to_draw(shootout, tmp_path):
    (path,) = draw(shootout("eager", seq_lens=(160,)), tmp_path / "plot.png")
    assert path.exists()


def test_missing_matplotlib_names_the_remedies(shootout, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidArgumentError, match=r"no plot \(--no-plot\), or pip install 'attnzoo\[plots\]'"):
        draw(shootout("eager"), tmp_path / "plot.png")


@pytest.fixture
def command(monkeypatch):
    """Run ``attnzoo bench`` on the tiny family; all of it runs in this process."""
    monkeypatch.setattr(runner, "run", lambda plan, bar: run(plan, bar, launch=Worker, check=lambda job: (True, "")))
    common = ["--model", "tiny", "--seq-len", "40", "--rounds", "1", "--no-train", "--threads", "1"]
    return lambda *arguments: invoke_bench(*common, *arguments)


def test_command_writes_table_json_and_plot(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("--backend", "sdpa")
    assert result.exit_code == 0, result.output
    assert "tiny-led: whole model" in result.output and "original" in result.output
    (path,) = (tmp_path / "shootout").glob("tiny-model-*.json")
    assert path.with_suffix(".png").exists()
    assert Shootout.read(path).plan["backends"] == ["sdpa"]


def test_json_on_standard_output_is_alone_there(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("--backend", "sdpa", "--json", "-")
    assert result.exit_code == 0 and json.loads(result.stdout)["plan"]["backends"] == ["sdpa"]
    assert not list(tmp_path.iterdir()), "no file, and no plot beside it"


def test_command_fails_on_red_rows(command, tmp_path):
    result = command("--backend", "wrong", "--json", str(tmp_path / "a.json"), "--no-plot")
    assert result.exit_code == 1 and "outside the error budget" in result.output
    assert not list(tmp_path.glob("*.png"))


def test_command_needs_matplotlib_only_for_a_requested_plot(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = command("--backend", "eager", "--json", str(tmp_path / "a.json"))
    assert result.exit_code == 0 and "attnzoo[plots]" in result.output and (tmp_path / "a.json").exists()
    result = command("--backend", "eager", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"))
    assert isinstance(result.exception, InvalidArgumentError) and not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_unwritable_file_is_refused_before_anything_runs(command, tmp_path, monkeypatch, option):
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder.png").mkdir()
    for path in ("file/below.png", "folder.png"):
        error = command(option, path).exception
        assert isinstance(error, InvalidArgumentError) and f"{option[2:]}: got {path}" in str(error)
    assert not list(tmp_path.glob("shootout/*"))


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"models": ["ledd"]}, UnknownNameError, r"model: got 'ledd' \(did you mean 'led'"),
        ({"backends": ["sdpaa"]}, UnknownNameError, "did you mean 'sdpa'"),
        ({"backends": ["lsh:num_hash=2"]}, UnknownNameError, "did you mean 'num_hashes'"),
        ({"backends": ["blocked-local:window=one"]}, InvalidArgumentError, "window of .*: got 'one'"),
        ({"backends": ["auto:window=1"]}, InvalidArgumentError, "backend: got 'auto', which is not accepted"),
        ({"scope": "modul"}, UnknownNameError, "scope: got 'modul'.*did you mean"),
        ({"dtype": "int8"}, UnknownNameError, "dtype: got 'int8'.*allowed: 'bfloat16', 'float16'"),
        ({"device": "tpu"}, UnknownNameError, "device: got 'tpu'.*'cpu', 'cuda'"),
        ({"seq_lens": [0]}, InvalidArgumentError, "seq-len: got 0; allowed: an integer >= 1"),
        ({"rounds": 0}, InvalidArgumentError, "rounds: got 0"),
        ({"threads": -1}, InvalidArgumentError, "threads: got -1"),
        ({"batch": 0}, InvalidArgumentError, "batch: got 0"),
    ],
)
def test_wrong_values_raise(values, error, words):
    with pytest.raises(error, match=words):
        make_plan(**values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_raises():
    with pytest.raises(InvalidArgumentError, match="device: got 'cuda'; allowed: 'cpu'"):
        make_plan(device="cuda")


def test_plans_follow_the_options():
    default = make_plan(["led"])
    assert default.seq_lens == (1024, 2048, 4096) and default.modes == (False, True) and default.train_limit == 2048
    assert make_plan(full=True).seq_lens[-1] == 16384 and make_plan(full=True).train_limit is None
    assert make_plan(train=True).modes == (True,) and make_plan(train=True).train_limit is None
    assert make_plan(train=False).modes == (False,) and make_plan(dtype="bf16").dtype == "bfloat16"
