"""Check with PyTorch's profiler whether the kernel that a backend reports was really executed.

The profiler records every operator. For kernels of ``scaled_dot_product_attention`` (SDPA), the recorded operators
show whether the reported kernel ran.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

# Operator of torch.nn.functional.scaled_dot_product_attention -> the kernel that the operator runs.
_OPERATORS = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_attention_math": "math",
}
# Kernel names that backends report -> the kernel that must have run.
_CLAIMS = {"flash_cpu": "flash", **{kernel: kernel for kernel in _OPERATORS.values()}}

# The name that backends report for plain operations, which run no SDPA kernel.
PLAIN = "eager"


@contextmanager
def witness() -> Iterator[Counter[str]]:
    """Context manager that counts the forward runs of each SDPA kernel. The counts are complete on exit."""
    ran: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield ran
    # The other public ways to read a profile (``events``, ``key_averages``) build a Python object with forty fields for
    # each operator. For the gate of a model with two layers, they took 0.45 s of CPU time, and the trace takes 0.03 s.
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    for event in events:
        if event["name"] in _OPERATORS:
            ran[_OPERATORS[event["name"]]] += 1


def claimed(reported: Iterable[str]) -> frozenset[str]:
    """Return the kernels of SDPA among the reported kernels. A report may join names, as in ``"flash+math"``."""
    names = (name for kernels in reported for name in kernels.split("+"))
    return frozenset(_CLAIMS[name] for name in names if name in _CLAIMS)


def false_claims(reported: Iterable[str], ran: Iterable[str]) -> tuple[str, ...]:
    """Return the SDPA kernels that a backend reported, but that did not run."""
    return tuple(sorted(claimed(reported) - set(ran)))


def misreports(reported: Mapping[str, int], ran: Mapping[str, int]) -> list[str]:
    """Return one line for each SDPA kernel that ran less often than reported, and one line for unreported kernels.

    Unreported kernels are listed only if a backend reported plain operations (``eager``).

    Args:
        reported: for each name that backends reported, the number of calls.
        ran: for each SDPA kernel, the number of forward runs. One call may run a kernel several times.
    """
    calls: Counter[str] = Counter()
    for kernels, count in reported.items():
        calls.update(dict.fromkeys(claimed([kernels]), count))
    lines = [f"reported {kernel}, which did not run" for kernel in false_claims(reported, ran)]
    lines += [
        f"reported {kernel} in {count} calls, but it ran {ran[kernel]} times"
        for kernel, count in sorted(calls.items())
        if kernel in ran and ran[kernel] < count
    ]
    unclaimed = sorted(set(ran) - set(calls))
    if unclaimed and PLAIN in reported:
        lines.append(f"reported {PLAIN}, but {', '.join(unclaimed)} ran")
    return lines
