"""Which code a result is of: between releases the version is the same for all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path


def digest(folders: Mapping[str, Path]) -> str:
    """Twelve hex digits of all Python files in folders, each with the name its folder has in the package.

    The same whether a folder lies in the package, as in a wheel, or beside it, as in the repository.
    """
    files = {
        (Path(name) / path.relative_to(folder)).as_posix(): path
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
    }
    found = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()[:12]


@cache
def installed() -> str:
    """The digest of the installed attnzoo."""
    import attnzoo
    import attnzoo.adapters
    import attnzoo.benchmarks

    packages = {"": attnzoo, "adapters": attnzoo.adapters, "benchmarks": attnzoo.benchmarks}
    return digest({name: Path(package.__path__[0]) for name, package in packages.items()})
