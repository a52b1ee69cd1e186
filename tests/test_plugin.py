"""A third-party plug-in: a separate distribution is installed, found by its entry points, and passes the kit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnzoo
from attnzoo.registry import registry

PLUGIN = Path(__file__).parent / "plugin"


def run_python(*command, **environment):
    """Run ``python -m`` and return its output. If the command fails, the test fails with this output."""
    command, environment = [sys.executable, "-m", *command], {**os.environ, **environment}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=PLUGIN.parent.parent
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install a copy of the plug-in into an empty folder, offline, and return the folder."""
    sources, target = tmp_path_factory.mktemp("sources") / "plugin", tmp_path_factory.mktemp("site-packages")
    shutil.copytree(PLUGIN, sources, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run_python("pip", "install", *offline, "--target", str(target), str(sources))
    return target


def test_an_installed_plugin_is_found_and_passes_its_tests(installed):
    """Its tests run the conformance kit on its backend, ``verify`` on its model, and ``doctor``."""
    # pytest puts the folder of the tests on the path first: the sources there would hide the installed package.
    assert not (PLUGIN / "tests" / "attnzoo_example_plugin").exists()
    arguments = ("-q", "-p", "no:cacheprovider", "tests/plugin/tests/checks.py")
    output = run_python("pytest", *arguments, PYTHONPATH=str(installed))
    assert " passed" in output and "failed" not in output and "skipped" not in output


def test_a_plugin_that_is_not_installed_is_not_listed():
    assert "tiled" not in attnzoo.backends() and "gpt_neo" not in registry.model_types()
