"""The wheel contains every module of ``attnzoo/``, ``adapters/`` and ``benchmarks/``, and few data files."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnzoo

ROOT = Path(__file__).parent.parent
FOLDERS = ("attnzoo", "adapters", "benchmarks")
PRINT_FILES = """
import json, pathlib, setuptools
from distutils.core import run_setup
command = run_setup("setup.py", stop_after="config").get_command_obj("build_py")
command.ensure_finalized()
data = [str(pathlib.Path(folder, name)) for _, folder, _, names in command.data_files for name in names]
print(json.dumps([*command.get_source_files(), *data]))
"""


def packaged_files(root):
    """The files that setup.py and pyproject.toml put into a wheel, relative to the root of the repository."""
    command = [sys.executable, "-W", "ignore", "-c", PRINT_FILES]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def module_files(root):
    return {str(path.relative_to(root)) for folder in FOLDERS for path in (root / folder).rglob("*.py")}


@pytest.fixture
def repository(tmp_path):
    """A copy of the files that a build needs."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


DATA = {
    "attnzoo/py.typed",
    "attnzoo/reporting/html/page.css",
    "attnzoo/reporting/html/page.js",
    "benchmarks/data/SOURCE.md",
    "benchmarks/data/moby_dick_start.txt",  # the whole text is in the source distribution only
}


def test_the_wheel_has_every_module_and_data_file():
    assert packaged_files(ROOT) == module_files(ROOT) | DATA


def test_the_version_has_one_place():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project and 'version = { attr = "attnzoo.__version__" }' in project
    assert f"\nversion: {attnzoo.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{attnzoo.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_source_distribution_names_existing_files():
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    named = [name for line in lines if line.startswith("include ") for name in line.split()[1:]]
    assert "CITATION.cff" in named and not [name for name in named if not (ROOT / name).exists()]


def test_the_extra_all_needs_no_cuda():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r'^all = \["attnzoo\[(.*)\]"\]$', project, re.MULTILINE)
    assert {"accelerate", "plots", "report", "peers"} <= set(extras.split(","))
    assert not {"xformers", "flash-attn"} & set(extras.split(","))


@pytest.mark.parametrize("folder", ["attnzoo/backends/sdpa", "attnzoo/spec"])
def test_a_folder_without_init_is_missing_from_the_wheel(repository, folder):
    (repository / folder / "__init__.py").unlink()
    missing = module_files(repository) - packaged_files(repository)
    assert missing == {name for name in module_files(repository) if name.startswith(f"{folder}/")}
