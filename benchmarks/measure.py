"""Clocks, peak memory and a description of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from attnzoo.benchmarks import source

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Peak(NamedTuple):
    """Peak memory of one run.

    Attributes:
        extra: bytes above what was in use before the run (weights and inputs are in use before).
        before: bytes in use before.
        method: how it was measured.
    """

    extra: int
    before: int
    method: str


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], None], device: str) -> float:
    """Wall-clock seconds of one run, device work included; the garbage is collected before the clock starts."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def peak_of(run: Callable[[], None], device: str) -> Peak:
    """Peak memory of a run, in a process that has done nothing else yet.

    CPU: the kernel's high-water mark of resident memory, reset before the run (Linux), with every large tensor in a
    mapping of its own: the C library would keep those of up to 32 MiB in a heap, where what was freed leaves holes that
    count, more or fewer as chance has it. Elsewhere ``getrusage``, which cannot be reset, so memory that building the
    model needed for a moment hides as much of the run's. CUDA: the peak of the caching allocator.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated() - before, before, "torch.cuda.max_memory_allocated")
    _warm_up()
    _trim()
    if _reset_high_water():
        before = _status_bytes("VmRSS")
        with _large_apart():
            run()
        return Peak(max(0, _status_bytes("VmHWM") - before), before, "VmHWM after clear_refs")
    before = _max_rss()
    run()
    return Peak(max(0, _max_rss() - before), before, "getrusage ru_maxrss (not resettable here)")


def _warm_up() -> None:
    """Start thread pools and load libraries: a run should not be charged for them."""
    x = torch.randn(256, 256, requires_grad=True)
    with torch.enable_grad():
        torch.softmax(x @ x, -1).sum().backward()


def _trim() -> None:
    """Give freed memory back, so that a run cannot reuse it unseen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def _large_apart() -> Iterator[None]:
    """Have glibc map whatever is larger than a MiB on its own.

    Afterwards its thresholds are where a process that has freed large tensors has them: 32 MiB, and twice that before
    the heap's end is given back. Both have to be said, because saying one keeps glibc from moving the other.
    """
    trim, threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, with ways of its own
        yield
        return
    set_option(threshold, 1 << 20)
    try:
        yield
    finally:
        set_option(threshold, 32 << 20)
        set_option(trim, 64 << 20)


def _reset_high_water() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
        return _status_bytes("VmHWM") <= _status_bytes("VmRSS") + (8 << 20)
    except (OSError, StopIteration):
        return False


def _status_bytes(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _max_rss() -> int:
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(device: str) -> int | None:
    """Bytes free for a run; None where this cannot be known."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def machine(device: str) -> dict[str, str]:
    """Versions and hardware, for the reader of a result."""
    import transformers

    import attnzoo

    found = {
        "attnzoo": attnzoo.__version__,
        "source": source.installed(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
