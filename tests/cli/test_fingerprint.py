"""``attnzoo fingerprint`` prints what an adapter records."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli import app as cli
from attnzoo.originals.fingerprint import fingerprint, object_at
from attnzoo.registry import registry

MODULE = "transformers.models.gpt_neox.modeling_gpt_neox"
PATHS = [f"{MODULE}:GPTNeoXAttention.forward", f"{MODULE}:rotate_half"]


def run(*arguments):
    return CliRunner().invoke(cli.app, ["fingerprint", *arguments], catch_exceptions=False)


def test_fingerprint_prints_one_line_per_path():
    result = run(*PATHS)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"{path}  {fingerprint(object_at(path))}" for path in PATHS]


def test_fingerprint_prints_json():
    assert json.loads(run("--json", "-", *PATHS).stdout) == {path: fingerprint(object_at(path)) for path in PATHS}


def test_fingerprint_prints_what_adapters_record():
    point = registry.find_adapter("gpt_neox").points[0]
    for path, known in point.verified.items():
        assert run(path).stdout.split()[1] in known


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "allowed: MODULE:FUNCTION, e.g. transformers."),
        (f"{MODULE}:", "allowed: MODULE:FUNCTION, e.g. transformers."),
        (PATHS[0].replace(":", "."), f"(did you mean {PATHS[0]!r}?)"),
        ("transfomers:X", "there is no module 'transfomers' (did you mean 'transformers'"),
        (
            "transformers.models.gptneox.modeling_gpt_neox:X",
            "there is no module 'transformers.models.gptneox' (did you mean 'gpt_neox'",
        ),
        (
            "transformers.models.gpt_neox.modelling_gpt_neox:X",
            "no module 'transformers.models.gpt_neox.modelling_gpt_neox' (did you mean 'modeling_gpt_neox'",
        ),
        ("my_model:X", "but there is no module 'my_model'; allowed: a module that can be imported"),
        (f"{MODULE}.deeper:X", f"there is no module '{MODULE}.deeper'; allowed: a module that can be imported"),
        (f"{MODULE}:GPTNeoXAtention.forward", f"{MODULE} has no 'GPTNeoXAtention' (did you mean 'GPTNeoXAttention'"),
        (f"{MODULE}:GPTNeoXAttention.foward", "GPTNeoXAttention has no 'foward' (did you mean 'forward'"),
        (f"{MODULE}:rotate_halve", "has no 'rotate_halve' (did you mean 'rotate_half'"),
        (f"{MODULE}:GPTNeoXAttention", "a class; allowed: a function written in Python with def"),
        (
            "builtins:len",
            "an object of type builtin_function_or_method; allowed: a function written in Python with def",
        ),
    ],
)
def test_wrong_path_is_refused_with_similar_names(path, message):
    with pytest.raises(attnzoo.InvalidArgumentError) as caught:
        run(PATHS[0], path)
    assert str(caught.value).startswith(f"path: got {path!r}")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_dependency", "which cannot be imported here (No module named 'no_such_dependency')"),
        ("raise RuntimeError('no device')", "whose module raises RuntimeError when imported"),
        ("exec('def f(): pass')", "but the source of the function is not available (<string>)"),
    ],
)
def test_module_without_the_function_is_refused(tmp_path, monkeypatch, source, message):
    (tmp_path / "no_serving_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "no_serving_module", raising=False)
    with pytest.raises(attnzoo.InvalidArgumentError, match=re.escape(message)):
        run("no_serving_module:f")


def test_modules_in_the_current_folder_are_importable(tmp_path, monkeypatch):
    """As with ``python -m``. The path of a console script lacks the current folder."""
    (tmp_path / "model_in_this_folder.py").write_text("def forward(states):\n    return states\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    result = run("model_in_this_folder:forward")
    assert result.exit_code == 0
    assert result.stdout.split() == ["model_in_this_folder:forward", fingerprint(object_at(result.stdout.split()[0]))]


def test_documented_example_is_up_to_date():
    point = registry.find_adapter("gpt_neox").points[0]
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (documented,) = re.findall(rf"^{re.escape(PATHS[0])}  (\w+)$", text, re.MULTILINE)
    assert documented in point.verified[PATHS[0]]
