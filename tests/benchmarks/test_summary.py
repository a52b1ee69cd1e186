"""The page of results is what the JSON in the repository says, and each table's command is that of its shootout."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from attnzoo.benchmarks import cli, summary
from attnzoo.benchmarks.rows import Shootout
from attnzoo.benchmarks.runner import Plan
from attnzoo.errors import InvalidArgumentError

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
FILES = sorted(RESULTS.glob("*/*.json"))


def test_the_page_of_the_documentation_is_up_to_date():
    assert PAGE.read_text() == summary.page(RESULTS) + "\n", (
        f"{PAGE} is stale: other results are in {RESULTS} now. Run: make docs-results"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_command_of_a_table_plans_its_shootout(path, monkeypatch):
    class Planned(Exception):
        pass

    def stop(plan):
        raise Planned(plan)

    found = Shootout.read(path)
    if found.plan["device"] != "cpu":
        pytest.skip(f"planning it takes a {found.plan['device']} device")
    monkeypatch.setattr(cli, "_run", stop)
    app = typer.Typer()
    app.command()(cli.bench)
    ran = CliRunner().invoke(app, shlex.split(summary.command(found))[2:])
    assert isinstance(ran.exception, Planned), ran.output
    defaults = json.loads(json.dumps(asdict(Plan())))  # of options that are younger than the results
    assert json.loads(json.dumps(asdict(ran.exception.args[0]))) == {**defaults, **found.plan}


def test_every_line_is_a_row(shootout, tmp_path):
    found = shootout("sdpa", "absent")
    found.write(tmp_path / "one" / "tiny.json")
    text = summary.page(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| 40 |")]
    assert [line.split(" | ")[1] for line in lines] == ["original", "`sdpa`"], "absent has no numbers"
    assert f"## `one`: {found.versions['cpu']}" in text and "### tiny, model, forward" in text


def test_results_without_the_original_say_so_in_their_command(shootout, tmp_path):
    found = shootout("sdpa", original=False)
    found.write(tmp_path / "one" / "tiny.json")
    (row,) = found.rows
    assert row.backend == "sdpa" and row.seconds and row.peak_bytes and row.speedup is row.peak_ratio is None
    assert " --no-original " in summary.command(found) and " --no-original " not in summary.command(shootout("sdpa"))
    assert "| - |" in summary.page(tmp_path)


def test_what_differs_from_the_published_configuration_is_below_the_table(shootout, tmp_path):
    found = shootout("sdpa", seq_lens=(40, 160))
    found.write(tmp_path / "one" / "tiny.json")
    lines = summary.page(tmp_path).splitlines()
    assert lines[-1] == "S = 160: the published configuration has 128 positions; here there are 160."
    assert lines[-3].startswith("| 160 | `sdpa` |")


def test_whole_models_come_first(shootout, tmp_path):
    shootout("sdpa", scope="attention", peers=False).write(tmp_path / "one" / "a.json")
    shootout("sdpa").write(tmp_path / "one" / "b.json")
    headings = [line for line in summary.page(tmp_path).splitlines() if line.startswith("### ")]
    assert headings == ["### tiny, model, forward", "### tiny, attention, forward"]


def test_red_rows_are_no_results(shootout, tmp_path):
    shootout("wrong").write(tmp_path / "one" / "tiny.json")
    with pytest.raises(InvalidArgumentError, match=r"folder: got .*tiny\.json, which has red or failed rows"):
        summary.page(tmp_path)


def test_a_folder_without_results(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"folder: got .*no JSON"):
        summary.page(tmp_path)


def test_results_of_fewer_layers_say_so_in_their_command_and_below_the_table(shootout, tmp_path):
    found = shootout("sdpa", layers=1)
    found.write(tmp_path / "one" / "tiny.json")
    assert {row.note for row in found.rows} == {"1 layer(s) in each stack, fewer than published"}
    assert " --layers 1 " in summary.command(found) and " --layers " not in summary.command(shootout("sdpa"))
    assert "1 layer(s) in each stack" in summary.page(tmp_path)


def test_layers_are_of_whole_models():
    with pytest.raises(InvalidArgumentError, match=r"layers: got --layers with scope 'module'; allowed: --scope model"):
        Plan(families=("tiny",), scope="module", layers=1)
    with pytest.raises(InvalidArgumentError, match="layers: got 0"):
        Plan(families=("tiny",), layers=0)
