"""The wheel contains every module of ``attnzoo/``, ``adapters/`` and ``benchmarks/``, and their data files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_wheel_has_every_module_and_data_file():
    data = {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks" / "data").iterdir()}
    assert packaged_files(ROOT) == module_files(ROOT) | data | {"attnzoo/py.typed"}


@pytest.mark.parametrize("folder", ["attnzoo/backends/sdpa", "attnzoo/spec"])
def test_a_folder_without_init_is_missing_from_the_wheel(repository, folder):
    (repository / folder / "__init__.py").unlink()
    missing = module_files(repository) - packaged_files(repository)
    assert missing == {name for name in module_files(repository) if name.startswith(f"{folder}/")}
