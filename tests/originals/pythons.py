"""Fingerprints computed by the other Python interpreters of this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from attnzoo.originals import fingerprint

VERSIONS = [f"3.{minor}" for minor in range(10, 16)]
_SCRIPT = Path(__file__).with_name("on_another_python.py")


@cache
def interpreters() -> dict[str, str]:
    """Return ``{version: path}`` of every interpreter that starts: the running one, those on PATH and pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    on_path = [
        path
        for version in VERSIONS
        for folder in os.get_exec_path()
        if (path := shutil.which(f"python{version}", path=folder))
    ]
    starting: dict[str, str] = {}
    for path in [sys.executable, *on_path, *map(str, sorted(pyenv.glob("versions/*/bin/python")))]:
        version = _version(path)
        if version in VERSIONS:
            starting.setdefault(version, path)
    return starting


def _version(path: str) -> str | None:
    """Return the version of an interpreter, or None if it does not start (some pyenv shims only print an error)."""
    try:
        run = _run(path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _run(path: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    # Isolated and without site-packages: fingerprints need neither torch nor transformers.
    command = [path, "-I", "-S", "-X", "utf8", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", timeout=120)


def fingerprints_on(path: str, sources: dict[str, str], files: dict[str, str]) -> dict[str, dict[str, str | None]]:
    """Return the fingerprints that another interpreter computes.

    Args:
        path: the interpreter.
        sources: by name, text that begins with a function.
        files: by name, a Python file that defines ``f``. Its fingerprint is None if the interpreter cannot parse it.
    """
    request = json.dumps({"module": fingerprint.__file__, "sources": sources, "files": files})
    run = _run(path, str(_SCRIPT), text=request)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
