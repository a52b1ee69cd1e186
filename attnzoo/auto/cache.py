"""Where measurements are kept: one JSON file per environment, in a folder of the user's.

Files are replaced whole, never written in place, so a reader sees an old one or a new one; writers take turns by a lock
(where the system has ``flock``; elsewhere the last one wins). A process reads a file once. A file that cannot be read
is as good as none: there is one warning, ``attnzoo doctor`` says why, and ``auto`` goes by priority.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from attnzoo.auto.environment import Environment
from attnzoo.auto.measurements import Measurement
from attnzoo.errors import CacheError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VARIABLE = "ATTNZOO_CACHE_DIR"
FORMAT = "attnzoo auto 1"

Known = dict[str, Measurement]
_known: dict[Path, Known] = {}
_guard = threading.RLock()
_generation = 0


class CacheWarning(UserWarning):
    """A file of measurements cannot be read and is ignored."""


def folder() -> Path:
    """Where the files are: ``$ATTNZOO_CACHE_DIR``, else ``attnzoo`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get(VARIABLE)
    if own:
        return Path(own) / "auto"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else _home() / ".cache") / "attnzoo" / "auto"


def _home() -> Path:
    """The user's home; the folder for temporary files where there is none (a container's nameless user)."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())


def generation() -> int:
    """A number that grows with every change, so that callers can cache decisions that depend on measurements."""
    return _generation


def forget() -> None:
    """Forget what this process has read; the files stay."""
    global _generation
    with _guard:
        _known.clear()
        _generation += 1


def find(environment: Environment, key: str) -> Measurement | None:
    """What is known of a request and size class in an environment; a file that cannot be read is warned of, once."""
    return known(environment).get(key)


def known(environment: Environment) -> Known:
    """All that is known in an environment, by key."""
    path = folder() / environment.file
    with _guard:
        if path not in _known:
            try:
                found = _read(path)
                if found.environment not in ({}, environment.to_dict()):
                    raise ValueError("it is of another device or other versions")
                _known[path] = found.measurements
            except (OSError, ValueError) as error:
                _known[path] = {}
                message = f"{path} is ignored, 'auto' goes by priority: {error}; to start anew: attnzoo tune --clear"
                warnings.warn(message, CacheWarning, stacklevel=2)
        return _known[path]


def add(environment: Environment, measured: Iterable[Measurement], *, save: bool) -> None:
    """Take measurements in, for this process, and for others if they are to be saved.

    Raises:
        CacheError: they could not be written (this process knows them all the same).
    """
    global _generation
    new = {one.key: one for one in measured}
    path = folder() / environment.file
    with _guard:
        _generation += 1
        _known[path] = {**known(environment), **new}
        if save and new:
            with _errors(path), _turn(path.parent):
                _write(path, environment, {**_others(path), **new})


def check_writable() -> None:
    """Raise before anything is measured that could not be kept.

    Raises:
        CacheError: the folder cannot be made or written to.
    """
    where = folder()
    with _errors(where):
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where):
            pass


def obstacle() -> str:
    """Why measurements cannot be kept, as far as one can tell without trying; empty if nothing speaks against it."""
    where = folder()
    try:
        nearest = next(path for path in (where, *where.parents) if path.exists())
        fits = nearest.is_dir() and os.access(nearest, os.W_OK)
    except OSError as error:
        return f"{where}: {type(error).__name__}: {error}"
    return "" if fits else f"{where} cannot be written: {nearest} is no folder that is open to writing (${VARIABLE})"


def clear() -> list[Path]:
    """Remove every file of measurements, of all environments; returns what was removed.

    Raises:
        CacheError: a file cannot be removed.
    """
    with _guard:
        forget()
        removed = _files()
        for path in removed:
            with _errors(path):
                path.unlink(missing_ok=True)
    return removed


class Stored(NamedTuple):
    """One file.

    Attributes:
        environment: plain data of the environment it is for.
        measurements: what is in it, by key.
        problem: why it cannot be read; empty if it can.
    """

    path: Path
    environment: Mapping[str, Any]
    measurements: Known
    problem: str = ""


def stored() -> list[Stored]:
    """Every file there is, readable or not."""
    found = []
    for path in _files():
        try:
            found.append(_read(path))
        except (OSError, ValueError) as error:
            found.append(Stored(path, {}, {}, str(error)))
    return found


def _files() -> list[Path]:
    return sorted(folder().glob("*.json"))


def _read(path: Path) -> Stored:
    """A file's content, empty if there is none.

    Raises:
        OSError: it cannot be read. ValueError: it is not one of ours; says what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Stored(path, {}, {})
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"not JSON of ours: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"not a file of the format {FORMAT!r}")
    environment, listed = data.get("environment"), data.get("measurements")
    if not isinstance(environment, dict) or not isinstance(listed, list):
        raise ValueError("without environment or measurements")
    made = [Measurement.from_dict(one) for one in listed]
    return Stored(path, environment, {one.key: one for one in made})


def _others(path: Path) -> Known:
    """What is in the file by now; nothing if it is one that cannot be read, which is then replaced."""
    try:
        return _read(path).measurements
    except ValueError:
        return {}


def _write(path: Path, environment: Environment, measurements: Known) -> None:
    listed = [one.to_dict() for _, one in sorted(measurements.items())]
    data = {"format": FORMAT, "environment": environment.to_dict(), "measurements": listed}
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _turn(where: Path) -> Iterator[None]:
    """Wait until no other process writes in this folder."""
    where.mkdir(parents=True, exist_ok=True)
    with (where / ".lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        allowed = f"a folder that can be written to (${VARIABLE}), or save=False"
        raise CacheError(f"cache: got {path}, {type(error).__name__}: {error}; allowed: {allowed}") from error
