"""docs/results.md contains the JSON in the repository, and the command of each table runs the same shootout."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from attnzoo.benchmarks import runner, summary
from attnzoo.benchmarks.rows import Shootout
from attnzoo.benchmarks.runner import ShootoutPlan
from attnzoo.errors import InvalidArgumentError
from tests.benchmarks.conftest import invoke_bench

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
FILES = sorted(RESULTS.glob("*/*.json"))


def test_page_in_the_documentation_is_up_to_date():
    assert PAGE.read_text() == summary.page(RESULTS) + "\n", (
        f"{PAGE} does not show the results in {RESULTS}. Run: make docs-results"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_command_of_a_table_has_the_same_plan(path, monkeypatch):
    class Planned(Exception):
        pass

    def stop(plan, progress):
        raise Planned(plan)

    result = Shootout.read(path)
    if result.plan["device"] != "cpu":
        pytest.skip(f"the plan needs a {result.plan['device']} device")
    monkeypatch.setattr(runner, "run", stop)
    ran = invoke_bench(*shlex.split(summary.command(result))[2:])
    assert isinstance(ran.exception, Planned), ran.output
    defaults = json.loads(json.dumps(asdict(ShootoutPlan())))  # for fields that are younger than the file
    assert json.loads(json.dumps(asdict(ran.exception.args[0]))) == {**defaults, **result.plan}


def test_page_has_a_line_for_every_row_with_numbers(shootout, tmp_path):
    result = shootout("sdpa", "absent")
    result.write(tmp_path / "one" / "tiny.json")
    text = summary.page(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| 40 |")]
    assert [line.split(" | ")[1] for line in lines] == ["original", "`sdpa`"], "absent has no numbers"
    assert f"## `one`: {result.versions['cpu']}" in text and "### tiny, model, forward" in text


def test_command_without_the_original(shootout, plain, tmp_path):
    result = shootout("sdpa", original=False)
    result.write(tmp_path / "one" / "tiny.json")
    (row,) = result.rows
    assert row.backend == "sdpa" and row.seconds and row.peak_bytes and row.speedup is row.peak_ratio is None
    assert " --no-original " in summary.command(result) and " --no-original " not in summary.command(plain)
    assert "| - |" in summary.page(tmp_path)


def test_page_shows_differences_from_the_published_configuration_below_the_table(shootout, tmp_path):
    shootout("sdpa", seq_lens=(40, 160)).write(tmp_path / "one" / "tiny.json")
    lines = summary.page(tmp_path).splitlines()
    assert lines[-1] == "S = 160: the published configuration has 128 positions; here there are 160."
    assert lines[-3].startswith("| 160 | `sdpa` |")


def test_page_shows_the_overhead_of_host_scopes(shootout, tmp_path):
    result = shootout("sdpa", scope="overhead")
    result.write(tmp_path / "one" / "tiny.json")
    page = summary.page(tmp_path)
    sdpa = next(row for row in result.rows if row.backend == "sdpa")
    assert f"| {sdpa.overhead * 1e6:.0f} us |" in page and "| `counting` | original |" in page
    assert "--scope overhead" in summary.command(result)


def test_page_starts_with_whole_models(shootout, plain, tmp_path):
    shootout("sdpa", scope="attention", peers=False).write(tmp_path / "one" / "a.json")
    plain.write(tmp_path / "one" / "b.json")
    headings = [line for line in summary.page(tmp_path).splitlines() if line.startswith("### ")]
    assert headings == ["### tiny, model, forward", "### tiny, attention, forward"]


def test_page_refuses_red_rows(shootout, tmp_path):
    shootout("wrong").write(tmp_path / "one" / "tiny.json")
    with pytest.raises(InvalidArgumentError, match=r"folder: got .*tiny\.json, which has red or failed rows"):
        summary.page(tmp_path)


def test_page_refuses_a_folder_without_results(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"folder: got .*no JSON"):
        summary.page(tmp_path)


def test_fewer_layers_are_in_the_command_and_below_the_table(shootout, plain, tmp_path):
    result = shootout("sdpa", layers=1)
    result.write(tmp_path / "one" / "tiny.json")
    assert {row.note for row in result.rows} == {"1 layer(s) in each stack, fewer than published"}
    assert " --layers 1 " in summary.command(result) and " --layers " not in summary.command(plain)
    assert "1 layer(s) in each stack" in summary.page(tmp_path)


def test_layers_need_scope_model():
    with pytest.raises(InvalidArgumentError, match=r"layers: got --layers with scope 'module'; allowed: --scope model"):
        ShootoutPlan(families=("tiny",), scope="module", layers=1)
    with pytest.raises(InvalidArgumentError, match="layers: got 0"):
        ShootoutPlan(families=("tiny",), layers=0)
