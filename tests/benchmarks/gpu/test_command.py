"""``python -m attnzoo.benchmarks.gpu``, and the same from a checkout without an installation."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from attnzoo.benchmarks.gpu import __main__ as command
from attnzoo.benchmarks.gpu import checkout
from attnzoo.benchmarks.gpu.session import Session, load
from attnzoo.benchmarks.gpu.settings import Settings
from attnzoo.errors import InvalidArgumentError, UnknownNameError
from tests.support.gpu_rows import MACHINE

ROOT = Path(__file__).parents[3]


def test_dry_run_from_a_bare_checkout(tmp_path):
    """Without the finder of the editable installation, attnzoo has no adapters and no benchmarks in the checkout."""
    before = _files(ROOT)
    program = f"""
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.argv = ["checkout.py", "--device", "cpu", "--tiny", "--seconds", "900", "--only", "module-*", "--out", "out"]
runpy.run_path({str(ROOT / "benchmarks" / "gpu" / "checkout.py")!r}, run_name="__main__")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    index, results = load("out", tmp_path / "out")
    assert [(item["name"], item["status"]) for item in index["items"]] == [("module-led-64", "done")]
    (shootout,) = results.shootouts
    assert {row.backend for row in shootout.rows} >= {"native", "sdpa", "auto"}
    assert all(row.status == "ok" and "(reduced)" in row.checkpoint for row in shootout.rows)
    assert "| led | 64 |" in ran.stdout and "## Red lines: 0" in ran.stdout
    assert _files(ROOT) == before, "the checkout is untouched"


def _files(root):
    folders = ("attnzoo", "adapters", "benchmarks", "tests")
    return {path for name in folders for path in (root / name).rglob("*") if "__pycache__" not in path.parts}


def test_copy_has_the_entry_points_and_modules_of_an_installation(tmp_path):
    checkout.lay_out(ROOT, tmp_path)
    (found,) = metadata.distributions(path=[str(tmp_path)])
    installed = metadata.distribution("attnzoo")
    assert (found.name, found.version) == (installed.name, installed.version)

    def points(distribution):
        return {(point.group, point.name, point.value) for point in distribution.entry_points}

    assert points(found) == points(installed)
    for name in ("adapters/led.py", "benchmarks/gpu/__main__.py", "benchmarks/data/moby_dick.txt", "py.typed"):
        assert (tmp_path / "attnzoo" / name).exists()
    assert not (tmp_path / "attnzoo" / "benchmarks" / "results").exists()


def test_script_needs_nothing_but_the_standard_library():
    """It runs before any path is set, so it must not import a module beside it."""
    tree = ast.parse((ROOT / "benchmarks" / "gpu" / "checkout.py").read_text())
    names = [node.names[0].name if isinstance(node, ast.Import) else node.module
             for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--device", "tpu"], UnknownNameError, "device: got 'tpu'"),
        (["--device", "cpu"], InvalidArgumentError, "device: got 'cpu' without --tiny"),
        (["--seconds", "-1"], InvalidArgumentError, "seconds: got -1"),
        (["--device", "cpu", "--tiny", "--only", "nothing*"], UnknownNameError, r"only: got 'nothing\*'"),
        (["--device", "cpu", "--tiny", "--against", "nowhere"], InvalidArgumentError, "against: got nowhere"),
        (["--seconds", "0"], InvalidArgumentError, "out: got .*, which has no index.json"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        command.main(["--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_missing_card_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidArgumentError, match=r"device: got 'cuda', but torch .* sees none"):
        command.main(["--out", str(tmp_path / "out")])


def test_zero_seconds_only_read_and_compare(tmp_path, capsys):
    for name in ("old", "new"):
        Session(tmp_path / name, Settings("cpu", tiny=True), 10.0, MACHINE).run([])
    arguments = ["--seconds", "0", "--out", str(tmp_path / "new"), "--against", str(tmp_path / "old")]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "# Imaginary 9000" in printed and "## Compared with the earlier run" in printed
    index = json.loads((tmp_path / "new" / "index.json").read_text())
    index["items"] = [{"name": "calls", "status": "failed", "seconds": 1, "estimate": 1, "limit": 1, "reason": "no"}]
    (tmp_path / "new" / "index.json").write_text(json.dumps(index))
    assert command.main(arguments) == 1
    assert "RED item calls: no" in capsys.readouterr().out
