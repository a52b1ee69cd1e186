"""Fake kernels: packages that are planted for one test, and a machine that seems to have a device for them."""

import sys
from pathlib import Path

import pytest

from attnzoo import functional, registry
from attnzoo.backends import flash_attn_kernel, varlen_kernel

PACKAGES = Path(__file__).parent / "fakes" / "packages"


def forget():
    """Forget what was looked up and what was refused."""
    for cached in (flash_attn_kernel._package, flash_attn_kernel._parts_unavailable):
        cached.cache_clear()
    for cached in (varlen_kernel._function, varlen_kernel._parts_unavailable):
        cached.cache_clear()
    functional.refusals.cache_clear()
    registry.choose.cache_clear()


@pytest.fixture
def fresh(monkeypatch):
    """Looked up anew, before and after the test; optional packages as if nobody had imported them yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "xformers")]:
        monkeypatch.delitem(sys.modules, name)
    forget()
    yield monkeypatch
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "xformers")]:
        del sys.modules[name]
    monkeypatch.undo()
    forget()
