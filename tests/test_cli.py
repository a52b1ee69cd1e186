"""The command line, as a user meets it."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import attnzoo
from attnzoo import cli

from .models.zoo import gpt_bigcode, led


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def run_raising(*arguments):
    CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


def attnzoo_command(*arguments):
    command = [sys.executable, "-m", "attnzoo.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_doctor_names_every_backend_model_and_package():
    output = run("doctor").output
    for name in (*attnzoo.backends(), *attnzoo.registry.model_types(), "torch", "transformers", "cuda"):
        assert name in output


def test_doctor_says_nothing_twice():
    for finding in json.loads(run("doctor", "--json").output):
        for separator in ("; ", ", "):
            parts = finding["detail"].split(separator)
            assert len(parts) == len(set(parts)), finding


def test_doctor_as_json():
    findings = json.loads(run("doctor", "--json").output)
    assert {finding["kind"] for finding in findings} == {"machine", "package", "backend", "model"}
    assert all(finding["detail"] for finding in findings)


def test_verify_a_checkpoint_on_disk(tmp_path):
    led().save_pretrained(tmp_path)
    result = run("verify", str(tmp_path), "--seq-len", "40")
    assert result.exit_code == 0, result.output
    assert "within the error rule" in result.output
    data = json.loads(run("verify", str(tmp_path), "--seq-len", "40", "--json", "--no-gradients").stdout)
    assert data["ok"] is True


def test_explain_takes_options(tmp_path):
    led().save_pretrained(tmp_path)
    told = run("explain", str(tmp_path), "--backend", "blocked-local:window=8")
    assert told.exit_code == 0, told.output
    assert "approximate: window of 8 keys" in told.output
    assert "runs" in run("explain", str(tmp_path), "--backend", "auto").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "lde"), "did you mean 'led'"),
        (("explain", "longforme"), "did you mean 'longformer'"),
        (("verify", "led", "--backend", "spda", "--seq-len", "8"), "did you mean 'sdpa'"),
        (("verify", "."), "model: got '.'"),
        (("explain", "EleutherAI/pythia-160m"), "'reformer_local', or the folder of a checkpoint"),
        (("matrix", "led", "--json", "--markdown"), "format: got --json and --markdown; allowed: one of the two"),
        (("verify", "gpt_bigcode", "--seq-len", "4096"), "seq-len: got 4096; allowed: less: the published conf"),
    ],
)
def test_errors_are_one_message_without_a_traceback(arguments, message):
    done = attnzoo_command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_that_does_not_load(tmp_path):
    led().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(
        attnzoo.InvalidArgumentError, match=r"model: got .*Safetensor.*; allowed: the folder of a checkp"
    ):
        run_raising("explain", str(tmp_path))


def test_a_checkpoint_that_names_no_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "led"}')
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"model: got .*names no architecture; allowed: the folder"):
        run_raising("explain", str(tmp_path))


@pytest.mark.parametrize("command", ["verify", "tune"])
def test_more_tokens_than_a_checkpoint_has_positions_for(tmp_path, command):
    gpt_bigcode(n_positions=16).save_pretrained(tmp_path)
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"seq-len: got 17, on which GPTBigCode.* raises IndexError"):
        run_raising(command, str(tmp_path), "--seq-len", "17")


@pytest.mark.parametrize("command", [("-m", "attnzoo"), ("-m", "attnzoo.cli")], ids=" ".join)
def test_the_version(command):
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"attnzoo {attnzoo.__version__}\n"), done.stderr


def test_help_lists_the_commands():
    output = attnzoo_command("--help").stdout
    for command in ("doctor", "matrix", "verify", "bench"):
        assert command in output
