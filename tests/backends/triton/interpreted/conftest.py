"""These tests run in a process with ``TRITON_INTERPRET=1`` (``make test-interpreted``, ``test_interpreted.py``)."""

import os
from dataclasses import replace

import pytest

from attnzoo.backends.triton import tile_sizes
from attnzoo.backends.triton.tile_sizes import Tile, is_interpreted

collect_ignore_glob = [] if is_interpreted() else ["test_*.py"]
IS_LONG = os.environ.get("ATTNZOO_HYPOTHESIS_PROFILE") == "long"

if is_interpreted():
    from triton.runtime import interpreter

    from tests.support.interpreter import use_changes

    use_changes()


def use_tiles(monkeypatch, queries, keys):
    """Use tiles of this size for inputs of any length."""
    sizes = Tile(queries, keys)
    monkeypatch.setattr(tile_sizes, "_INTERPRETED_SHORT", sizes)
    monkeypatch.setattr(tile_sizes, "_INTERPRETED_LONG", sizes)
    tile_sizes.tile.cache_clear()


@pytest.fixture
def no_overflow_checks(monkeypatch):
    """Leave out the interpreter's check of every integer operation, which takes a third of the time.

    The tests of the kernels and of the kit have these checks.
    """
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))


@pytest.fixture
def large_tiles(monkeypatch):
    """Tiles that hold all of a short input. They are fast."""
    use_tiles(monkeypatch, 64, 64)
    yield
    tile_sizes.tile.cache_clear()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of unequal sides, smaller than a short input."""
    use_tiles(monkeypatch, 16, 32)
    yield
    tile_sizes.tile.cache_clear()
