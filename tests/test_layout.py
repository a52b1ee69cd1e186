"""Printed text fits the terminal: another width changes only spaces and line ends."""

import pytest

import attnzoo
from attnzoo.cli import app as cli
from attnzoo.cli.tune import stored_measurements_text
from attnzoo.layout import aligned, fit, group_by
from attnzoo.tuning import tuner
from tests.support.models import causal_inputs, gpt_neox, led

WIDTHS = (60, 80, 120)
WIDE = 10_000
COMMANDS = ("doctor", "matrix", "verify", "explain", "tune", "bench", "report")


@pytest.fixture
def columns(monkeypatch):
    """Return a function that sets the width of the terminal."""
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))


@pytest.fixture(params=[*WIDTHS, None])
def assert_fits_the_terminal(request, monkeypatch, columns):
    """Return a function that calls a function in this terminal and in a wide terminal, and compares both texts.

    The width None means no terminal, as in a pipe.
    """

    def check(make_text):
        columns(WIDE)
        wide = make_text()
        if request.param is None:
            monkeypatch.delenv("COLUMNS")
        else:
            columns(request.param)
        assert_fits(make_text(), request.param or 80, wide)

    return check


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("led")
    led().save_pretrained(folder)
    return str(folder)


def assert_fits(text, width, wide):
    """Assert that only single words are longer than the terminal, and that no word is cut, dropped or added."""
    too_long = [line for line in text.splitlines() if len(line) > width and len(line.split()) > 1]
    assert not too_long, too_long
    assert text.split() == wide.split()


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a command and returns its output. (typer's CliRunner would force 80 columns.)"""

    def run_command(*arguments):
        monkeypatch.setattr("sys.argv", ["attnzoo", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 0
        return capsys.readouterr().out

    return run_command


@pytest.mark.parametrize(
    "arguments", [("--help",), *((command, "--help") for command in COMMANDS), ("doctor",), ("matrix",)], ids=" ".join
)
def test_commands_fit_the_terminal(run, arguments, assert_fits_the_terminal):
    assert_fits_the_terminal(lambda: run(*arguments))


@pytest.mark.parametrize("options", [(), ("--backend", "flash"), ("--backend", "blocked-local:window=8")], ids=" ".join)
def test_explain_fits_the_terminal(run, checkpoint, options, assert_fits_the_terminal):
    assert_fits_the_terminal(lambda: run("explain", checkpoint, *options))


def test_help_lists_the_whole_summary_of_each_command(run, columns):
    columns(60)
    listed = " ".join(run("--help").split())
    for command in COMMANDS:
        summary = run(command, "--help").split("\n\n")[1]
        assert " ".join(summary.split()) in listed


def test_measurements_fit_the_terminal(monkeypatch, tmp_path, assert_fits_the_terminal):
    monkeypatch.setenv("ATTNZOO_CACHE_DIR", str(tmp_path))
    report = tuner.tune(gpt_neox(), causal_inputs(16, "none"), rounds=1)
    assert_fits_the_terminal(report.__str__)
    assert_fits_the_terminal(stored_measurements_text)


@pytest.mark.parametrize(
    ("backend", "options"), [("sdpa", {}), ("auto", {}), ("native", {}), ("blocked-local", dict(window=6, sinks=2))]
)
def test_a_handle_fits_the_terminal(backend, options, assert_fits_the_terminal):
    model = gpt_neox()
    with attnzoo.patch(model, backend, **options) as handle:
        model(**causal_inputs(16, "none"))
    assert_fits_the_terminal(handle.__str__)


# Functions of attnzoo.layout


@pytest.mark.parametrize("width", WIDTHS)
def test_fit_wraps_at_spaces_and_keeps_the_indentation(columns, width):
    columns(width)
    text = "head:\n    " + "some-thing/with_names " * 20
    assert_fits(fit(text), width, text)
    assert all(line.startswith("    some" if number == 1 else "") for number, line in enumerate(fit(text).splitlines()))
    assert fit("a\n\nb") == "a\n\nb"


def test_a_word_longer_than_the_terminal_is_not_cut(columns):
    columns(60)
    path = "/" + "folder-with-a-name/" * 5
    assert path in fit(f"kept in {path} for now").splitlines()[1]
    assert path in aligned([("name", "no", f"kept in {path} for now")])


def test_aligned_moves_a_last_cell_without_room_below_its_row(columns):
    columns(30)
    rows = [("a", "yes", "one two three four five six"), ("long-name", "no", "a-word-of-twenty-two")]
    assert aligned(rows).splitlines() == [
        "a          yes  one two three",
        "                four five six",
        "long-name  no",
        "  a-word-of-twenty-two",
    ]
    assert aligned([("a", "")], indent=2) == "  a" and aligned([]) == ""


def test_group_by_keeps_the_order():
    assert group_by("bAaB", str.lower) == [["b", "B"], ["A", "a"]]
