"""Fixtures for kernels that are not installed: fake packages on a CPU that stands for a GPU."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnzoo.backends.varlen import flash_attn_kernel, packed, varlen_kernel, xformers_kernels
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.backends.varlen.xformers import XformersBackend
from attnzoo.registry import registry
from tests.backends.fakes import aten

FAKES = Path(__file__).parent / "fakes"
PACKAGES = ("flash_attn", "xformers")


def clear_caches():
    """Clear the caches of package look-ups and of refusals."""
    for module in (flash_attn_kernel, varlen_kernel, xformers_kernels):
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
                value.cache_clear()
    registry.forget()


def unload():
    """Remove the optional packages from sys.modules and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def fresh(monkeypatch):
    """Clear the cached look-ups of optional packages before and after the test."""
    imported = unload()
    clear_caches()
    yield monkeypatch
    monkeypatch.undo()
    unload()
    sys.modules.update(imported)
    clear_caches()


@pytest.fixture
def on_cpu(fresh):
    """Let the kernels run on the CPU."""
    fresh.setattr(packed, "no_device", lambda: None)
    fresh.setattr(xformers_kernels, "example_device", lambda: torch.device("cpu"))
    for backend in (FlashBackend, XformersBackend):
        fresh.setattr(backend, "capabilities", replace(backend.capabilities, devices=frozenset({"cpu"})))
    return fresh


@pytest.fixture
def flash_attn(on_cpu):
    """The fake flash_attn, which records its calls in ``CALLS``."""
    on_cpu.syspath_prepend(FAKES / "flash_attn_package")
    return importlib.import_module("flash_attn.flash_attn_interface")


@pytest.fixture
def xformers(on_cpu):
    """The fake xformers, which records its calls in ``CALLS``."""
    on_cpu.syspath_prepend(FAKES / "xformers_package")
    return importlib.import_module("xformers.ops.fmha")


@pytest.fixture
def varlen(on_cpu):
    """PyTorch's operators behind ``varlen_attn`` on the CPU; yields their calls."""
    with aten.cpu_operators() as calls:
        yield calls
