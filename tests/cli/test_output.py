"""Every command takes ``--json``: a file gets the JSON beside the printed text, and ``-`` prints the JSON instead."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli import app as cli
from attnzoo.cli.output import command_line
from tests.support.models import gpt_neox

COMMANDS = typer.main.get_command(cli.app).commands
FINGERPRINT = ("fingerprint", "transformers.models.gpt_neox.modeling_gpt_neox:rotate_half")


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_option(name):
    options = {option: parameter for parameter in COMMANDS[name].params for option in parameter.opts}
    assert options["--json"].metavar == "FILE"


@pytest.mark.parametrize("arguments", [("doctor",), ("matrix", "gpt_neox"), FINGERPRINT], ids=" ".join)
def test_a_file_gets_the_json_and_the_text_is_printed(arguments, tmp_path):
    path = tmp_path / "new" / "result.json"
    written, printed = run(*arguments, "--json", str(path)), run(*arguments, "--json", "-")
    assert written.exit_code == printed.exit_code == 0, written.output + printed.output
    assert json.loads(path.read_text()) == json.loads(printed.stdout)
    assert written.stdout == run(*arguments).stdout


def test_a_folder_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(attnzoo, "verify", lambda *_, **__: pytest.fail("it ran"))
    for command in ("verify", "tune"):
        error = run(command, "led", "--json", str(tmp_path)).exception
        assert isinstance(error, attnzoo.InvalidArgumentError)
        assert str(error) == f"json: got {tmp_path}: Is a directory; allowed: a path that can be written"


def test_verify_stores_what_is_needed_to_repeat_it(tmp_path):
    gpt_neox().save_pretrained(tmp_path / "a model")
    arguments = ("verify", str(tmp_path / "a model"), "--seq-len", "20", "--passages", "1", "--no-gradients")
    data = json.loads(run(*arguments, "--json", "-").stdout)
    assert data["command"] == f"attnzoo verify '{tmp_path}/a model' --seq-len 20 --passages 1 --no-gradients"
    assert data["versions"]["attnzoo"] == attnzoo.__version__ and data["created"].endswith("+00:00")


def test_command_line_leaves_out_defaults():
    command = COMMANDS["verify"]
    with command.make_context("verify", ["led", "--fast", "--backend", "lsh:seed=1", "--json", "-"]) as context:
        assert command_line(context) == "attnzoo verify led --backend lsh:seed=1 --fast"


def test_run_writes_the_kernel_calls_of_the_program(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text("import os; os.chdir('/')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["attnzoo"])
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr(attnzoo, "stats", lambda: {"sdpa": 3})
    try:
        assert run("run", "--json", "calls.json", "program.py").exit_code == 0
    finally:
        attnzoo.uninstall()
        monkeypatch.undo()
    assert json.loads(Path(tmp_path, "calls.json").read_text()) == {"sdpa": 3}
