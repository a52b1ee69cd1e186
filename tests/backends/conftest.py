"""Kernels that are not here: fake packages, planted for one test, on a machine that seems to have a device for them."""

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


def forget():
    """Forget what was looked up and what was refused."""
    for module in (flash_attn_kernel, varlen_kernel, xformers_kernels):
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
                value.cache_clear()
    registry.forget()


def unload():
    """Forget the optional packages, as if nobody had imported them; returns what they were."""
    names = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def fresh(monkeypatch):
    """Everything optional is looked up anew, before the test and after it."""
    imported = unload()
    forget()
    yield monkeypatch
    monkeypatch.undo()
    unload()
    sys.modules.update(imported)
    forget()


@pytest.fixture
def on_cpu(fresh):
    """The CPU is taken for a device that the kernels run on."""
    fresh.setattr(packed, "no_device", lambda: None)
    fresh.setattr(xformers_kernels, "example_device", lambda: torch.device("cpu"))
    for backend in (FlashBackend, XformersBackend):
        fresh.setattr(backend, "capabilities", replace(backend.capabilities, devices=frozenset({"cpu"})))
    return fresh


@pytest.fixture
def flash_attn(on_cpu):
    """The fake flash_attn; what is called of it is in ``CALLS``."""
    on_cpu.syspath_prepend(FAKES / "flash_attn_package")
    return importlib.import_module("flash_attn.flash_attn_interface")


@pytest.fixture
def xformers(on_cpu):
    """The fake xformers; what is called of it is in ``CALLS``."""
    on_cpu.syspath_prepend(FAKES / "xformers_package")
    return importlib.import_module("xformers.ops.fmha")


@pytest.fixture
def varlen(on_cpu):
    """PyTorch's operators behind ``varlen_attn``, on the CPU; gives the calls made of them."""
    with aten.planted() as made:
        yield made
