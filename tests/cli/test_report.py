"""``attnzoo report`` makes a page of the JSON of ``bench`` or ``verify``, and names what is wrong with a file."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli import app as cli
from tests.support.models import gpt_neox
from tests.support.report_pages import Parsed, without_vega

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "epyc" / "led-model-forward-and-training.json"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    without_vega(monkeypatch)


def run(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def test_bench_gives_a_page(tmp_path):
    result = run("report", RESULT, "--out", tmp_path / "new" / "page.html")
    assert result.exit_code == 0 and "Every measured result is within the error rule" in result.output
    page = Parsed((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert "allenai/led-base-16384" in page.text and "attnzoo bench --model led --scope model" in page.text
    assert "AMD EPYC" in page.text and "2.13.0+cpu" in page.text


def test_verify_gives_a_page_beside_its_json(tmp_path):
    gpt_neox().save_pretrained(tmp_path / "model")
    path = tmp_path / "result.json"
    verified = run("verify", tmp_path / "model", "--fast", "--seq-len", 20, "--json", path)
    assert verified.exit_code == 0, verified.output
    assert run("report", path).exit_code == 0
    page = Parsed((tmp_path / "result.html").read_text(encoding="utf-8"))
    assert f"attnzoo verify {tmp_path / 'model'} --seq-len 20 --fast" in page.text


def test_json_has_what_the_page_shows(tmp_path):
    data = json.loads(run("report", RESULT, "--out", tmp_path / "a.html", "--json", "-").stdout)
    assert data["page"] == str(tmp_path / "a.html") and data["ok"] is True
    assert [section["title"] for section in data["sections"]][:2] == ["led: forward", "led: forward+backward"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("{", "JSONDecodeError"),
        ("[]", "the JSON is a list, not an object"),
        ("{}", "unknown or missing name: 'rows'"),
        ('{"backend": "sdpa", "ok": true, "end_to_end": []}', "unknown or missing name: 'sites'"),
        ('{"rows": [{"family": "led"}], "end_to_end": []}', "unknown or missing name"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    error = run("report", path).exception
    assert isinstance(error, attnzoo.InvalidArgumentError)
    assert str(error).startswith(f"result: got {path}: {message}"[:80])
    assert str(error).endswith("allowed: a JSON file that attnzoo bench --json or attnzoo verify --json wrote")
    assert not path.with_suffix(".html").exists()


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    error = run("report", RESULT, "--out", tmp_path).exception
    assert isinstance(error, attnzoo.InvalidArgumentError) and str(error).startswith(f"out: got {tmp_path}: Is a dir")
