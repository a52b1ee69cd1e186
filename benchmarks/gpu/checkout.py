"""Run :mod:`attnzoo.benchmarks.gpu` from a checkout that is not installed: ``python benchmarks/gpu/checkout.py``.

The options are those of ``python -m attnzoo.benchmarks.gpu``. The script copies the packages to a temporary folder, in
the layout of an installation and with the entry points of ``pyproject.toml``. It needs no network, and writes nothing
into the checkout. PyTorch, transformers and the other dependencies must be importable.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
# Folder in the checkout -> folder in the copy, as package-dir in pyproject.toml.
FOLDERS = {"attnzoo": "attnzoo", "adapters": "attnzoo/adapters", "benchmarks": "attnzoo/benchmarks", "tests": "tests"}


def lay_out(checkout: Path, target: Path) -> None:
    """Copy the packages and the tests of a checkout to ``target``, as an installation would lay them out."""
    for source, copy in FOLDERS.items():
        leave_out = shutil.ignore_patterns("__pycache__", "results" if source == "benchmarks" else "")
        shutil.copytree(checkout / source, target / copy, ignore=leave_out)
    shutil.copy(checkout / "pyproject.toml", target)
    project, version = _project(checkout / "pyproject.toml"), _version(checkout / "attnzoo" / "__init__.py")
    info = target / f"{project['name']}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
    groups = {**project["entry-points"], "console_scripts": project["scripts"]}
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
             for group, entries in groups.items()]  # fmt: skip
    (info / "entry_points.txt").write_text("\n".join(lines))


def _project(path: Path) -> dict[str, Any]:
    """Return the table ``project`` of a pyproject.toml."""
    try:
        tomllib = import_module("tomllib")
    except ModuleNotFoundError:
        version = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
        sys.exit(f"error: python: got {version}, which cannot read pyproject.toml; allowed: Python 3.11 or newer")
    project: dict[str, Any] = tomllib.loads(path.read_text())["project"]
    return project


def _version(path: Path) -> str:
    """Return the literal ``__version__`` of a module, from which pyproject.toml takes the version."""
    (version,) = re.findall(r'^__version__ = "([^"]+)"', path.read_text(), re.MULTILINE)
    return str(version)


def main() -> None:
    """Copy the checkout, and run the command on the copy."""
    with tempfile.TemporaryDirectory(prefix="attnzoo-checkout-") as folder:
        lay_out(CHECKOUT, Path(folder))
        # The first entry of the path is the folder of this script. The copy takes its place, before any installation.
        sys.path[0] = folder
        earlier = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = folder + (os.pathsep + earlier if earlier else "")
        runpy.run_module("attnzoo.benchmarks.gpu", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
