"""The environment in which a measurement is valid: the device and the versions of packages with kernels."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# The packages that provide kernels, in addition to torch.
_PACKAGES = ("attnzoo", "triton", "flash-attn", "xformers")


@dataclass(frozen=True)
class Environment:
    """A device, and the versions of the packages that provide kernels for the device.

    ``name`` is the product name of the device. ``threads`` is the number of torch threads on a CPU, else 0.
    """

    device: str
    name: str
    threads: int
    versions: tuple[tuple[str, str], ...]

    @property
    def file(self) -> str:
        """The name of the cache file, which consists of the device's name and a hash of the environment."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')[:40]}-{digest[:12]}.json"

    def to_dict(self) -> dict[str, Any]:
        """Return the environment as plain data for JSON."""
        return {**asdict(self), "versions": dict(self.versions)}

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return f"{self.name}{threads}, {', '.join(f'{name} {version}' for name, version in self.versions)}"


def environment_of(device: torch.device) -> Environment:
    """Return the current environment of a device."""
    return _environment(device, torch.get_num_threads() if device.type == "cpu" else 0)


@lru_cache(maxsize=256)
def _environment(device: torch.device, threads: int) -> Environment:
    versions = [("torch", str(torch.__version__))]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions.append(("rocm", torch.version.hip) if torch.version.hip else ("cuda", str(torch.version.cuda)))
    else:
        name = f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
    versions += [(package, version) for package in _PACKAGES if (version := _version(package)) is not None]
    return Environment(device.type, name, threads, tuple(versions))


@lru_cache(maxsize=256)
def _version(package: str) -> str | None:
    try:
        return str(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def code_of(cls: type) -> str:
    """Return text that identifies the code of a class: the class path and the version of the package.

    A measurement stores this text. If the text of a backend has changed, ``auto`` ignores the stored measurement.
    """
    version = _version(cls.__module__.partition(".")[0])
    return f"{cls.__module__}:{cls.__qualname__}" + ("" if version is None else f" {version}")


def _cpu_model() -> str:
    """Return the product name of the processor. Linux lists this name in ``/proc/cpuinfo``."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"
