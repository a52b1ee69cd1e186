"""Digest of the source code. Results store the digest, because all code between two releases has the same version."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path


def digest(folders: Mapping[str, Path]) -> str:
    """Return a digest (twelve hex digits) of all Python files in ``folders``, ``{package name: folder}``.

    The digest does not depend on the paths of the folders. So a wheel and the repository have the same digest.
    """
    files = {
        (Path(name) / path.relative_to(folder)).as_posix(): path
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
    }
    sha = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        sha.update(f"{name} {len(content)}\n".encode() + content)
    return sha.hexdigest()[:12]


@cache
def installed() -> str:
    """Return the digest of the installed attnzoo, including its adapters and benchmarks."""
    import attnzoo
    import attnzoo.adapters
    import attnzoo.benchmarks

    packages = {"": attnzoo, "adapters": attnzoo.adapters, "benchmarks": attnzoo.benchmarks}
    return digest({name: Path(package.__path__[0]) for name, package in packages.items()})
