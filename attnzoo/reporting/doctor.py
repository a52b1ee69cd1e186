"""``doctor``: list what this machine can run. For everything else, give the reason and what to install."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from attnzoo.auto import cache
from attnzoo.auto.choice import BY_REQUEST, by_priority_because
from attnzoo.errors import AttnzooError, DriftError, raise_interrupts
from attnzoo.registry import ANY_MODEL_TYPE, registry

# Distribution, module, purpose.
_PACKAGES = (
    ("torch", "torch", "everything"),
    ("transformers", "transformers", "the models"),
    ("accelerate", "accelerate", "hooks and device maps; optional"),
    ("flash-attn", "flash_attn", "FlashAttention 2 kernels on CUDA; optional"),
    ("xformers", "xformers", "memory-efficient attention on CUDA; optional"),
    ("matplotlib", "matplotlib", "plots of attnzoo bench; optional"),
    ("vl-convert-python", "vl_convert", "pages of attnzoo report; optional"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``detail`` describes the item or, if ``ok`` is False, gives the reason and remedy."""

    kind: str  # "machine", "package", "backend", "model" or "entry point"
    name: str
    ok: bool
    detail: str


def examine() -> tuple[Finding, ...]:
    """Return findings on the machine, the packages, every backend and every adapter. This function never raises."""
    unused = (Finding("entry point", name, False, reason) for name, reason in registry.unused_entry_points())
    models = map(_model, registry.model_types())
    return (*_machine(), _cache(), *map(_package, _PACKAGES), *_backends(), *models, *unused)


def _machine() -> list[Finding]:
    if torch.cuda.is_available():
        cuda = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    else:
        lacks = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        cuda = f"torch {torch.__version__} {lacks}"
    cpu = f"{platform.machine()}, {os.cpu_count()} CPUs; number of torch threads: {torch.get_num_threads()}"
    return [
        Finding("machine", "python", True, platform.python_version()),
        Finding("machine", "cpu", True, cpu),
        Finding("machine", "cuda", torch.cuda.is_available(), cuda),
    ]


def _cache() -> Finding:
    name = "measurements for auto"
    try:
        because = by_priority_because()
    except AttnzooError as error:
        return Finding("machine", name, False, str(error))
    files = cache.stored()
    broken = [f"{file.path} is ignored: {file.problem}; run attnzoo tune --clear" for file in files if file.problem]
    broken += [cache.obstacle()] if cache.obstacle() else []
    if broken:
        return Finding("machine", name, False, "; ".join(broken))
    count = sum(len(file.measurements) for file in files)
    unused = f"; not used: {because}" if because else ""
    unused += "" if because == BY_REQUEST else "; without a measurement, a rule selects a backend or native"
    return Finding("machine", name, True, f"{count or 'none'} in {cache.folder()} (see attnzoo tune){unused}")


def _package(package: tuple[str, str, str]) -> Finding:
    distribution, module, purpose = package
    version = _version(distribution)
    missing = f"not installed ({purpose}): pip install {distribution}"
    try:
        importlib.import_module(module)
    except BaseException as error:  # a broken package may raise anything, SystemExit too
        raise_interrupts(error)
        absent = isinstance(error, ModuleNotFoundError) and error.name == module and version is None
        broken = f"{version or 'a copy without a version'} is broken: {type(error).__name__}: {error}"
        return Finding("package", distribution, False, missing if absent else broken)
    return Finding("package", distribution, True, f"{version or 'unknown version'} ({purpose})")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _backends() -> list[Finding]:
    findings = []
    for info in registry.backends().values():
        aliases = f" (also {', '.join(info.aliases)})" if info.aliases else ""
        exact = "exact" if info.exact else "approximate on dense models"
        devices = "" if info.capabilities is None else f" on {', '.join(sorted(info.capabilities.devices))}"
        findings.append(Finding("backend", info.name + aliases, info.available, info.reason or f"{exact}{devices}"))
    return findings


def _model(model_type: str) -> Finding:
    adapter = registry.find_adapter(model_type)
    if adapter is None:
        return Finding("model", model_type, False, registry.broken_adapters().get(model_type) or "no adapter")
    try:
        for point in adapter.points:
            importlib.import_module(point.cls.partition(":")[0])
            adapter.check_drift(point)
    except DriftError as error:
        return Finding("model", model_type, False, str(error))
    except BaseException as error:  # transformers imports optional packages, which may be broken
        raise_interrupts(error)
        return Finding("model", model_type, False, f"its code cannot be imported: {type(error).__name__}: {error}")
    names = ", ".join(dict.fromkeys(point.cls.rpartition(":")[2] for point in adapter.points))
    if model_type == ANY_MODEL_TYPE:
        names = "every module that calls transformers' AttentionInterface"
    return Finding("model", model_type, True, f"{names}; transformers {adapter.versions}")
