"""``attnzoo tune`` on the command line."""

import json

import pytest
from typer.testing import CliRunner

import attnzoo
from attnzoo.auto import cache
from attnzoo.cli import app as cli
from tests.support.models import gpt_neox


def run(*arguments):
    return CliRunner().invoke(cli.app, ["tune", *map(str, arguments)])


@pytest.fixture
def checkpoint(add, tmp_path):
    add("one"), add("two")
    gpt_neox().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_tune_measures_shows_and_removes(checkpoint):
    tuned = run(checkpoint, "--seq-len", 20, "--rounds", 1)
    assert tuned.exit_code == 0, tuned.output
    assert "GPTNeoXAttention, causal: float32" in tuned.stdout and "queries <= 32" in tuned.stdout
    assert "one-kernel" in tuned.stdout and "stored in" in tuned.stdout
    attention, module = json.loads(run(checkpoint, "--seq-len", 20, "--json", "-").stdout)
    assert attention["fresh"] is module["fresh"] is False
    assert (attention["scope"], set(attention["outcomes"])) == ("attention", {"one", "two"})
    assert (module["scope"], set(module["outcomes"])) == ("module", {"native", "auto"})
    shown = run("--show")
    assert shown.exit_code == 0 and "threads 1, torch" in shown.stdout and "queries <= 32" in shown.stdout
    (file,) = json.loads(run("--show", "--json", "-").stdout)
    assert len(file["measurements"]) == 2 and file["problem"] == ""
    assert "removed 1 file" in run("--clear").stdout
    assert "no measurements in" in run("--show").stdout and json.loads(run("--show", "--json", "-").stdout) == []


def test_tune_accepts_short_dtype_names(checkpoint):
    tuned = run(checkpoint, "--seq-len", 9, "--rounds", 1, "--dtype", "bf16")
    assert tuned.exit_code == 0 and "bfloat16" in tuned.stdout, tuned.output


def test_explain_shows_measurements(checkpoint):
    run(checkpoint, "--seq-len", 20, "--rounds", 1)
    result = CliRunner().invoke(cli.app, ["explain", str(checkpoint)])
    assert result.exit_code == 0, result.output
    assert "one: runs" in result.stdout
    assert "for forward at batch <= 1, queries <= 32, keys <= 32: measured" in result.stdout
    data = json.loads(
        CliRunner().invoke(cli.app, ["explain", str(checkpoint), "--backend", "two", "--json", "-"]).stdout
    )
    assert data["auto"] == {} and {verdict["backend"] for verdict in data["verdicts"]} == {"two"}


def test_tune_says_if_auto_ignores_measurements(checkpoint, monkeypatch):
    monkeypatch.setenv("ATTNZOO_AUTO", "priority")
    assert "by priority nevertheless: ATTNZOO_AUTO=pri" in run(checkpoint, "--seq-len", 9, "--train").stdout


def test_show_lists_a_file_that_cannot_be_read():
    cache.folder().mkdir(parents=True)
    (cache.folder() / "odd.json").write_text("{")
    assert "odd.json" in run("--show").stdout and "cannot be read: " in run("--show").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "model: got None; allowed: a model name or checkpoint folder, or --show or --clear"),
        (("led", "--show"), "model: got 'led' with --show; allowed: no model, because --show measures nothing"),
        (("lde",), "did you mean 'led'"),
        (("led", "--dtype", "fp8"), "dtype: got 'fp8'; allowed: float32, bfloat16, float16"),
        (("led", "--device", "tpu"), "device: got 'tpu'; allowed: cpu"),
        (("led", "--seq-len", "0"), "seq-len: got 0; allowed: an integer >= 1"),
    ],
)
def test_invalid_argument_is_refused(arguments, message):
    result = run(*arguments)
    assert isinstance(result.exception, attnzoo.AttnzooError) and message in str(result.exception)
