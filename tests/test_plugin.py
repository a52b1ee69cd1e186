"""Third-party plug-ins for real: a separate distribution, installed, found by its entry points, put to the kit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnzoo

PLUGIN = Path(__file__).parent / "plugin"


def succeed(*command, **environment):
    """Run Python, and show what it says if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        cwd=PLUGIN.parent.parent,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where the plug-in is installed: a folder of its own, without an index and without touching its sources."""
    sources, target = tmp_path_factory.mktemp("sources") / "plugin", tmp_path_factory.mktemp("site-packages")
    shutil.copytree(PLUGIN, sources, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    succeed("pip", "install", *offline, "--target", str(target), str(sources))
    return target


def test_an_installed_plugin_is_found_and_conforms(installed):
    """The plug-in's own tests: the conformance kit on its backend, ``verify`` on its model."""
    # They lie in a folder of their own: pytest puts it on the path, before what is installed.
    assert not (PLUGIN / "tests" / "attnzoo_example_plugin").exists()
    output = succeed(
        "pytest", "-q", "-p", "no:cacheprovider", "tests/plugin/tests/checks.py", PYTHONPATH=str(installed)
    )
    assert " passed" in output and "failed" not in output and "skipped" not in output


def test_the_command_line_knows_an_installed_plugin(installed):
    output = succeed("attnzoo.cli.app", "doctor", PYTHONPATH=str(installed), COLUMNS="200")
    assert "tiled (also online-softmax)" in output and "GPTNeoSelfAttention; transformers 5.17 to 5.23" in output


def test_where_it_is_not_installed_nobody_knows_it():
    assert "tiled" not in attnzoo.backends() and "gpt_neo" not in attnzoo.registry.model_types()
