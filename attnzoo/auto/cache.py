"""The cache of measurements: one JSON file for each device and version of the software, in the user's cache folder.

attnzoo always replaces a whole file, so a reader gets either the old or the new content. A lock lets one process write
at a time. Without ``flock`` (on Windows), one of two writers may lose its changes. A process reads each file only once.
If a file cannot be read, attnzoo warns once, ``attnzoo doctor`` shows the reason, and ``auto`` selects by priority.
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
from attnzoo.errors import CacheError, got_and_allowed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VARIABLE = "ATTNZOO_CACHE_DIR"
FORMAT = "attnzoo auto 1"

Measurements = dict[str, Measurement]
_loaded: dict[Path, Measurements] = {}
_lock = threading.RLock()
_generation = 0


class CacheWarning(UserWarning):
    """The warning that attnzoo cannot read a file of measurements and ignores the file."""


def folder() -> Path:
    """Return ``$ATTNZOO_CACHE_DIR/auto`` if the variable is set, else ``attnzoo/auto`` in the user's cache folder."""
    if directory := os.environ.get(VARIABLE):
        return Path(directory) / "auto"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else _home() / ".cache") / "attnzoo" / "auto"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a container whose user has no name and no home
        return Path(tempfile.gettempdir())


def generation() -> int:
    """Return a number that grows with each change of measurements. Callers put this number into their cache keys."""
    return _generation


def forget() -> None:
    """Forget the measurements that this process has read, without deleting files."""
    global _generation
    with _lock:
        _loaded.clear()
        _generation += 1


def find(environment: Environment, key: str) -> Measurement | None:
    """Return the measurement with this key (:func:`~attnzoo.auto.measurements.key_of`) in an environment, or None."""
    return known(environment).get(key)


def known(environment: Environment) -> Measurements:
    """Return ``{key: measurement}`` for an environment. Warn once (:class:`CacheWarning`) if the file is unreadable."""
    path = folder() / environment.file
    with _lock:
        if path not in _loaded:
            try:
                file = _read(path)
                if file.environment not in ({}, environment.to_dict()):
                    raise ValueError("the measurements are from another device or other versions")
                _loaded[path] = file.measurements
            except (OSError, ValueError) as error:
                _loaded[path] = {}
                message = (
                    f"{path} is ignored, 'auto' selects by priority: {error}; to delete all files: attnzoo tune --clear"
                )
                warnings.warn(message, CacheWarning, stacklevel=2)
        return _loaded[path]


def add(environment: Environment, measured: Iterable[Measurement], *, save: bool) -> None:
    """Add measurements to the cache in memory, and also to the file if ``save`` is True.

    Raises:
        CacheError: the file cannot be written. The measurements are still kept in this process.
    """
    global _generation
    new = {measurement.key: measurement for measurement in measured}
    path = folder() / environment.file
    with _lock:
        _generation += 1
        _loaded[path] = {**known(environment), **new}
        if save and new:
            with _cache_errors(path), _file_lock(path.parent):
                _write(path, environment, {**_saved(path), **new})


def check_writable() -> None:
    """Raise :class:`CacheError` unless the folder can be created and written to."""
    where = folder()
    with _cache_errors(where):
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where):
            pass


def obstacle() -> str:
    """Return why measurements cannot be saved, or ``""``. The check writes nothing, so it misses e.g. a full disk."""
    where = folder()
    try:
        nearest = next(path for path in (where, *where.parents) if path.exists())
        writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    except OSError as error:
        return f"{where}: {type(error).__name__}: {error}"
    return "" if writable else f"{where} cannot be written: {nearest} is not a writable folder (set ${VARIABLE})"


def clear() -> list[Path]:
    """Delete the files of all environments and return their paths. Raise :class:`CacheError` if a deletion fails."""
    with _lock:
        forget()
        removed = _files()
        for path in removed:
            with _cache_errors(path):
                path.unlink(missing_ok=True)
    return removed


class Stored(NamedTuple):
    """The content of one file. ``problem`` is the reason why the file cannot be read, or ``""`` without a problem."""

    path: Path
    environment: Mapping[str, Any]
    measurements: Measurements
    problem: str = ""


def stored() -> list[Stored]:
    """Return the content of every file in the folder. For an unreadable file, only ``path`` and ``problem`` are set."""
    files = []
    for path in _files():
        try:
            files.append(_read(path))
        except (OSError, ValueError) as error:
            files.append(Stored(path, {}, {}, str(error)))
    return files


def _files() -> list[Path]:
    return sorted(folder().glob("*.json"))


def _read(path: Path) -> Stored:
    """Return the content of a file. A missing file counts as empty. An invalid file raises :class:`ValueError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Stored(path, {}, {})
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"JSON nested too deeply: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"the field 'format' is not {FORMAT!r}")
    environment, listed = data.get("environment"), data.get("measurements")
    if not isinstance(environment, dict) or not isinstance(listed, list):
        raise ValueError("the field 'environment' or the list 'measurements' is missing")
    measurements = [Measurement.from_dict(item) for item in listed]
    return Stored(path, environment, {measurement.key: measurement for measurement in measurements})


def _saved(path: Path) -> Measurements:
    """Return the measurements in a file. An invalid file counts as empty, because the caller replaces the file."""
    try:
        return _read(path).measurements
    except ValueError:
        return {}


def _write(path: Path, environment: Environment, measurements: Measurements) -> None:
    listed = [measurement.to_dict() for _, measurement in sorted(measurements.items())]
    data = {"format": FORMAT, "environment": environment.to_dict(), "measurements": listed}
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _file_lock(where: Path) -> Iterator[None]:
    where.mkdir(parents=True, exist_ok=True)
    with (where / ".lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _cache_errors(path: Path) -> Iterator[None]:
    """Context manager that converts an ``OSError`` into a :class:`CacheError` that names the path."""
    try:
        yield
    except OSError as error:
        got, allowed = f"{path}, {type(error).__name__}: {error}", f"a writable folder (set ${VARIABLE}), or save=False"
        raise CacheError(got_and_allowed("cache", got, allowed)) from error
