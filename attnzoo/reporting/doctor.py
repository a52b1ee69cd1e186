"""What this machine can run, and for what it cannot: why, and what to install."""

from __future__ import annotations

import importlib
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from attnzoo.auto import cache
from attnzoo.auto.choice import by_priority_because
from attnzoo.errors import AttnzooError, DriftError, raise_interrupts
from attnzoo.registry import registry

# Distribution, module, and what it is for.
_PACKAGES = (
    ("torch", "torch", "everything"),
    ("transformers", "transformers", "the models"),
    ("accelerate", "accelerate", "hooks and device maps; optional"),
    ("flash-attn", "flash_attn", "FlashAttention 2 kernels on CUDA; optional"),
    ("xformers", "xformers", "memory-efficient attention on CUDA; optional"),
    ("matplotlib", "matplotlib", "the shootout's plots; optional"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        kind: ``"machine"``, ``"package"``, ``"backend"``, ``"model"`` or ``"entry point"``.
        name: of the thing.
        ok: whether it can be used.
        detail: version, or why not and what to do.
    """

    kind: str
    name: str
    ok: bool
    detail: str


def examine() -> tuple[Finding, ...]:
    """Look at the machine, the packages, every backend and every adapter. Nothing raises; nothing is changed."""
    return (*_machine(), _cache(), *map(_package, _PACKAGES), *_backends(), *_models(), *_unused())


def to_dicts(findings: tuple[Finding, ...]) -> list[dict[str, Any]]:
    """Plain data for JSON."""
    return [asdict(finding) for finding in findings]


def _machine() -> list[Finding]:
    found = [
        Finding("machine", "python", True, platform.python_version()),
        Finding("machine", "cpu", True, f"{platform.machine()}, {torch.get_num_threads()} threads"),
    ]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found.append(Finding("machine", "cuda", True, ", ".join(names)))
    elif torch.version.cuda is None:
        found.append(Finding("machine", "cuda", False, f"torch {torch.__version__} is built without CUDA"))
    else:
        found.append(Finding("machine", "cuda", False, f"torch {torch.__version__} sees no CUDA device"))
    return found


def _cache() -> Finding:
    """What ``auto`` goes by."""
    name, where = "measurements for auto", cache.folder()
    try:
        because = by_priority_because()
    except AttnzooError as error:
        return Finding("machine", name, False, str(error))
    files = cache.stored()
    broken = [f"{file.path} is ignored: {file.problem}; attnzoo tune --clear" for file in files if file.problem]
    broken += [cache.obstacle()] if cache.obstacle() else []
    if broken:
        return Finding("machine", name, False, "; ".join(broken))
    count = sum(len(file.measurements) for file in files)
    unused = f"; not used: {because}" if because else ""
    return Finding("machine", name, True, f"{count or 'none'} in {where} (attnzoo tune){unused}")


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
    found = []
    for info in registry.backends().values():
        aliases = f" (also {', '.join(info.aliases)})" if info.aliases else ""
        exact = "exact" if info.exact else "approximate on dense models"
        on = "" if info.capabilities is None else f" on {', '.join(sorted(info.capabilities.devices))}"
        found.append(Finding("backend", info.name + aliases, info.available, info.reason or f"{exact}{on}"))
    return found


def _unused() -> list[Finding]:
    return [Finding("entry point", name, False, reason) for name, reason in registry.unused_entry_points()]


def _models() -> list[Finding]:
    found = []
    for model_type in registry.model_types():
        adapter = registry.find_adapter(model_type)
        if adapter is None:
            found.append(
                Finding("model", model_type, False, registry.broken_adapters().get(model_type) or "no adapter")
            )
            continue
        try:
            for point in adapter.points:
                importlib.import_module(point.cls.partition(":")[0])
                adapter.check_drift(point)
        except DriftError as error:
            found.append(Finding("model", model_type, False, str(error)))
        except BaseException as error:  # transformers imports optional packages too, and stumbles over broken ones
            raise_interrupts(error)
            reason = f"its code cannot be imported: {type(error).__name__}: {error}"
            found.append(Finding("model", model_type, False, reason))
        else:
            names = ", ".join(dict.fromkeys(point.cls.rpartition(":")[2] for point in adapter.points))
            found.append(Finding("model", model_type, True, f"{names}; transformers {adapter.versions}"))
    return found
