"""Every script and notebook in examples/ runs, with fewer steps, and prints what was gained."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from attnzoo.benchmarks import runner
from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.worker import verify_here

EXAMPLES = Path(__file__).parents[2] / "examples"
# Options that shorten a run, and words of the output.
SCRIPTS = {
    "summarise_book": (["--parts", "2", "--tokens", "4"], "2 of 2 summaries are the same text"),
    "finetune_trainer": (["--steps", "2", "--batch", "1"], "loss by step, sdpa"),
    "finetune_lora": (["--steps", "2", "--length", "512"], "loss by step, sdpa"),
    "long_context_llama": (["--short", "64", "--length", "1024"], "recall 0."),
    "my_backend": (["--length", "256"], "0 failed"),
}


@pytest.fixture
def in_examples(monkeypatch, isolated_registry, tmp_path):
    """Run as a script does: the folder of the script is on the path, and output files go to an empty folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("common", None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_and_prints_the_gain(name, in_examples, monkeypatch, capsys):
    options, words = SCRIPTS[name]
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert words in output and "gain:" in output
    losses = [json.loads(line.partition(": ")[2]) for line in output.splitlines() if line.startswith("loss by step")]
    for original, patched in zip(losses[::2], losses[1::2], strict=True):
        assert patched == pytest.approx(original, abs=2e-3)


def test_every_script_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, "common"}


def test_notebook_runs(in_examples, monkeypatch):
    """The notebook runs on a model with few weights, at one length, in this process."""
    monkeypatch.setitem(WORKLOADS, "led", WORKLOADS["led"].reduced())
    monkeypatch.setattr(runner, "verify_in_process", lambda context, job: verify_here(job))
    cells = json.loads((EXAMPLES / "shootout.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for longer, shorter in {"seq_lens=(1024, 2048, 4096)": "seq_lens=(1024,)", "rounds=3": "rounds=1"}.items():
        assert code.count(longer) == 1
        code = code.replace(longer, shorter)
    names: dict[str, object] = {}
    exec(compile(code, "shootout.ipynb", "exec"), names)
    assert names["shootout"].ok
    assert Path("shootout/led.png").exists()


def test_notebook_contains_its_results():
    cells = json.loads((EXAMPLES / "shootout.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "make docs-notebook stores the results"
