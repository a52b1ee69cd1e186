"""Measure the time and the peak memory of a run, and describe the machine."""

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
from attnzoo.tuning.race import synchronize


class Peak(NamedTuple):
    """The bytes in use ``before`` a run, the ``extra`` bytes at the peak of the run, and the measuring ``method``."""

    extra: int
    before: int
    method: str


# The clocks of a timed run. CPU time counts all threads of the process, and not the time in which other programs run.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(run: Callable[[], None], device: str, clock: str = "wall") -> float:
    """Return the seconds of one run, until the device has finished. Garbage is collected before the run.

    ``clock`` is a key of :data:`CLOCKS`.
    """
    read_clock = CLOCKS[clock]
    gc.collect()
    synchronize(torch.device(device))
    start = read_clock()
    run()
    synchronize(torch.device(device))
    return read_clock() - start


def device_seconds(run: Callable[[], None], clear: Callable[[], None], device: str, clock: str = "wall") -> float:
    """Return the seconds of one run. On a GPU: the mean of as many runs as fit into 20 ms, but at most 50.

    ``clear`` drops the gradients of a run. ``clock`` is a key of :data:`CLOCKS`.

    A single short run on a GPU would mainly measure how long the first kernel takes to start. In a model, the host
    starts kernels while the GPU still computes earlier ones, so the mean of consecutive runs shows the time of the host
    only where the GPU waits for the host. A first run, which is not counted, decides the number of runs.
    """
    first = seconds(run, device, clock)
    clear()
    if device == "cpu":
        return first
    count = max(1, min(50, int(0.02 / max(first, 1e-6))))

    def repeat() -> None:
        for _ in range(count):
            run()
            clear()

    return seconds(repeat, device, clock) / count


def cpu_seconds(run: Callable[[], None]) -> float:
    """Return the CPU seconds of one run: the mean of as many runs as fit into 50 milliseconds, but at most 200.

    CPU time counts all threads of the process, and not the time in which other programs run. A first run, which is not
    counted, decides the number of runs.
    """
    gc.collect()
    start = time.process_time()
    run()
    count = max(1, min(200, int(0.05 / max(time.process_time() - start, 1e-6))))
    start = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - start) / count


def peak_of(run: Callable[[], None], device: str) -> Peak:
    """Return the peak memory of ``run``, which must be the first run of the process.

    - CUDA: the peak of the caching allocator.
    - Linux: the high-water mark of resident memory, which is reset before the run.
    - Other systems: by how much the run raises the peak of the process (``getrusage``). This peak cannot be reset. So
      memory that was freed before the run, and that the run uses again, is not counted.
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
    _start_thread_pools()
    _return_freed_memory()
    if _reset_high_water_mark():
        before = _resident_bytes("VmRSS")
        with _large_tensors_in_own_mappings():
            run()
        return Peak(max(0, _resident_bytes("VmHWM") - before), before, "VmHWM after clear_refs")
    before = _max_rss()
    run()
    return Peak(max(0, _max_rss() - before), before, "getrusage ru_maxrss (not resettable here)")


def _start_thread_pools() -> None:
    """Start thread pools and load libraries before the run, so that their memory is not counted."""
    x = torch.randn(256, 256, requires_grad=True)
    with torch.enable_grad():
        torch.softmax(x @ x, -1).sum().backward()


def _return_freed_memory() -> None:
    """Return freed memory to the operating system. A run that reused freed memory would seem to need less memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def _large_tensors_in_own_mappings() -> Iterator[None]:
    """Context manager in which glibc puts every allocation above 1 MiB into a separate memory mapping.

    By default, glibc allocates tensors of up to 32 MiB on the heap. Freed tensors leave gaps in the heap, which still
    count as resident memory. So the peak of the same run varied from 120 MiB to 200 MiB. On exit, the default cannot
    be restored: glibc no longer adapts thresholds that a program has set. So this function sets the largest values
    that glibc itself would choose: allocations above 32 MiB are mapped, and 64 MiB of free heap are kept.
    """
    trim, threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        yield
        return
    set_option(threshold, 1 << 20)
    try:
        yield
    finally:
        set_option(threshold, 32 << 20)
        set_option(trim, 64 << 20)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident_bytes("VmHWM") <= _resident_bytes("VmRSS") + (8 << 20)
    except (OSError, StopIteration):
        return False


def _proc_value(path: str, name: str) -> str:
    """Return the value of the first line ``name: value`` in a file of /proc."""
    lines = Path(path).read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(name))


def _resident_bytes(name: str) -> int:
    return int(_proc_value("/proc/self/status", f"{name}:").split()[0]) * 1024


def _max_rss() -> int:
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(device: str) -> int | None:
    """Return the number of free bytes on a device, or None if the system does not report this number."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        return int(_proc_value("/proc/meminfo", "MemAvailable:").split()[0]) * 1024
    except (OSError, StopIteration):
        return None


def machine(device: str) -> dict[str, str]:
    """Return the versions of the software and the names of the hardware, to store in result files."""
    import transformers

    import attnzoo

    try:
        cpu = _proc_value("/proc/cpuinfo", "model name")
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    values = {
        "attnzoo": attnzoo.__version__,
        "source": source.installed(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
    }
    if device == "cuda":
        values |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return values
