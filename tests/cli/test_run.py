"""`attnzoo run`: a program under `install`."""

import sys

import pytest
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli import app as cli

PROGRAM = """
import sys
from transformers import LEDConfig, LEDModel
sizes = dict(vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8)
model = LEDModel._from_config(LEDConfig(**sizes), **({"attn_implementation": sys.argv[2]} if sys.argv[2:] else {}))
print(__name__, sys.argv[1:], [m.forward.site.backend for m in model.modules() if "forward" in vars(m)][:1])
import beside
"""


@pytest.fixture(autouse=True)
def uninstalled(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    monkeypatch.delenv("ATTNZOO_BACKEND", raising=False)
    yield
    attnzoo.uninstall()


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("")
    return str(tmp_path / "program.py")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["run", *arguments])


def test_the_option_names_the_backend(program, monkeypatch):
    monkeypatch.setenv("ATTNZOO_BACKEND", "eager")
    result = run("--backend", "sdpa", program, "--epochs=3")
    assert (result.exit_code, result.output) == (0, "__main__ ['--epochs=3'] ['sdpa']\n")


def test_the_variable_names_the_backend(program, monkeypatch):
    monkeypatch.setenv("ATTNZOO_BACKEND", "eager")
    assert run(program).output == "__main__ [] ['eager']\n"


def test_without_a_backend_names_are_accepted(program):
    assert run(program).output == "__main__ [] []\n"
    assert run(program, "-m", "sdpa").output == "__main__ ['-m', 'sdpa'] ['sdpa']\n"


def test_a_module(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--backend", "sdpa", "-m", "program", "--help").output == "__main__ ['--help'] ['sdpa']\n"


def test_an_error_of_attnzoo_in_the_program_shows_its_line(program):
    result = run(program, "x", "attnzoo/spda")
    assert result.exit_code == 1
    assert 'program.py", line 5' in result.output and "did you mean 'sdpa'" in result.output


def test_the_exit_status_is_that_of_the_program(program, tmp_path):
    (tmp_path / "beside.py").write_text("raise SystemExit(7)")
    assert run(program).exit_code == 7


def test_a_missing_file_is_refused():
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"program: got 'nope.py'; allowed: a Python file"):
        CliRunner().invoke(cli.app, ["run", "nope.py"], catch_exceptions=False)
