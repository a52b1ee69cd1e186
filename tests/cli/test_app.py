"""The command line, as a user meets it."""

import io
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from typer.testing import CliRunner

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.cli import app as cli
from tests.support.models import gpt_bigcode, led


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def run_raising(*arguments):
    CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


def attnzoo_command(*arguments, columns=80):
    """Run the command in a new process."""
    command, environment = [sys.executable, "-m", "attnzoo", *arguments], {**os.environ, "COLUMNS": str(columns)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture
def main(monkeypatch):
    """Return a function that runs the entry point of the command in this process, and returns the exit status."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["attnzoo", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    return call


@pytest.fixture
def checkpoint(tmp_path):
    led().save_pretrained(tmp_path)
    return str(tmp_path)


def test_doctor_lists_every_backend_model_and_package():
    output = run("doctor").output
    for name in (*attnzoo.backends(), *attnzoo.registry.registry.model_types(), "torch", "transformers", "cuda"):
        assert name in output


def test_doctor_repeats_nothing():
    for finding in json.loads(run("doctor", "--json", "-").output):
        for separator in ("; ", ", "):
            parts = finding["detail"].split(separator)
            assert len(parts) == len(set(parts)), finding


def test_doctor_prints_json():
    findings = json.loads(run("doctor", "--json", "-").output)
    assert {finding["kind"] for finding in findings} == {"machine", "package", "backend", "model"}
    assert all(finding["detail"] for finding in findings)


def test_verify_accepts_a_checkpoint_on_disk(checkpoint):
    result = run("verify", checkpoint, "--seq-len", "40")
    assert result.exit_code == 0, result.output
    assert "within the error rule" in result.output
    assert "on all 2 passages" in result.output
    data = json.loads(run("verify", checkpoint, "--seq-len", "40", "--json", "-", "--no-gradients").stdout)
    assert data["ok"] is True and len(data["passages"]) == 2
    assert all(passage["ok"] and len(passage["sites"]) >= 6 for passage in data["passages"])


@pytest.mark.parametrize("backend", ["sdpa", "eager", "native"])
def test_verify_prints_each_site_once_in_80_columns(checkpoint, backend, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = (checkpoint, "--seq-len", "40", "--dtype", "fp32", "--backend", backend, "--passages", "2")
    result = run("verify", *arguments)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    for layer, name in itertools.product((0, 1), ("decoder", "encoder")):
        attention = "encoder_attn" if name == "decoder" else "self_attn.longformer_self_attn"
        assert result.stdout.count(f"led.{name}.layers.{layer}.{attention}\n") == 1


def test_verify_exits_with_1_if_a_check_fails(checkpoint, isolated_registry):
    @attnzoo.register_backend
    @dataclass(frozen=True)
    class Sloppy(EagerBackend):
        name: ClassVar[str] = "sloppy"

        def run(self, attention, probabilities=False):
            return super().run(replace(attention, scale=attention.scale * 1.01))

    result = run("verify", checkpoint, "--seq-len", "40", "--backend", "sloppy", "--passages", "2")
    assert result.exit_code == 1
    assert "NOT within the error rule on 2 of 2 passages" in result.output and "FAILS" in result.output
    assert "led.encoder.layers.0.self_attn.longformer_self_attn: output: error" in result.output


def test_verify_fast_compares_one_passage(checkpoint):
    data = json.loads(run("verify", checkpoint, "--fast", "--seq-len", "40", "--json", "-").stdout)
    assert data["ok"] is True and data["sites"] and not data["original_sites"] and data["original"]
    assert {check["what"] for site in data["sites"] for check in site["checks"]} == {"output", "gradient"}
    assert not any("gradient" in check["what"] for check in data["end_to_end"])
    assert "fast" in data["note"]
    native = json.loads(run("verify", checkpoint, "--fast", "--json", "-", "--backend", "native").stdout)
    assert native["ok"] is True and native["sites"] == native["original_sites"]


def test_progress_bar_needs_a_terminal(checkpoint, main, capfd):
    assert main("verify", checkpoint, "--fast", "--seq-len", "32") == 0
    output, errors = capfd.readouterr()
    assert "within the error rule" in output and "%" not in errors and "Loading" not in errors


def test_explain_accepts_backend_options(checkpoint):
    result = run("explain", checkpoint, "--backend", "blocked-local:window=8")
    assert result.exit_code == 0, result.output
    assert "approximate: window of 8 keys" in result.output
    assert "runs" in run("explain", checkpoint, "--backend", "auto").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "longforme"), "did you mean 'longformer'"),
        (("verify", "led", "--backend", "spda", "--seq-len", "8"), "did you mean 'sdpa'"),
        (("verify", "."), "model: got '.'"),
        (("verify", "led", "--dtype", "int8"), "dtype: got 'int8'; allowed: "),
        (("explain", "EleutherAI/pythia-160m"), "'reformer_local', or the folder of a checkpoint"),
        (
            ("verify", "gpt_bigcode", "--seq-len", "4096"),
            "seq-len: got 4096; allowed: a smaller number, because the published conf",
        ),
    ],
)
def test_error_is_one_message_within_the_terminal_width(arguments, message, main, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(*arguments) == 2
    assert_one_message(capfd.readouterr().err, message)


def test_error_in_a_new_process_is_one_message():
    """The new process also shows what the imports print."""
    done = attnzoo_command("verify", "lde", columns=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_message(done.stderr, "did you mean 'led'")


def assert_one_message(errors, message):
    assert errors.startswith("attnzoo: ") and message in " ".join(errors.split()) and "Traceback" not in errors
    assert all(len(line) <= 60 or " " not in line.strip() for line in errors.splitlines())


def test_checkpoint_that_does_not_load_is_refused(checkpoint, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"model: got .*Safetensor.*; allowed: the folder of a che"):
        run_raising("explain", checkpoint)


def test_checkpoint_without_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "led"}')
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"model: got .*names no architecture; allowed: the folder"):
        run_raising("explain", str(tmp_path))


@pytest.mark.parametrize("command", ["verify", "tune"])
def test_more_tokens_than_positions_are_refused(tmp_path, command):
    gpt_bigcode(n_positions=16).save_pretrained(tmp_path)
    with pytest.raises(
        attnzoo.InvalidArgumentError, match=r"seq-len: got 17, for which GPTBigCode.* raises IndexError"
    ):
        run_raising(command, str(tmp_path), "--seq-len", "17")


@pytest.mark.parametrize("command", [("-m", "attnzoo"), ("-m", "attnzoo.cli.app")], ids=" ".join)
def test_version_is_printed(command):
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"attnzoo {attnzoo.__version__}\n"), done.stderr


COMMANDS = ("doctor", "matrix", "explain", "verify", "tune", "bench", "report", "fingerprint", "run")


def test_help_lists_every_command():
    output = attnzoo_command("--help").stdout
    assert all(f"\n  {command} " in output for command in COMMANDS)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_command_runs_in_an_encoding_without_all_characters(encoding, main, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert main("matrix", "gpt_neox") == 0
    sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    assert "GPTNeoXAttention" in text and "?" in text, "the command prints no character that the encoding lacks"


def test_help_of_fingerprint_fits_the_terminal_and_cuts_no_word():
    """``tests/test_layout.py`` tests the help of the other commands, which fits narrower terminals, too."""
    narrow, wide = (attnzoo_command("fingerprint", "--help", columns=columns).stdout for columns in (80, 100))
    assert narrow.split() == wide.split()
    assert all(len(line) <= 80 for line in narrow.splitlines())
