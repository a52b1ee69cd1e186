"""Check with PyTorch's profiler whether the kernel that a backend reports was really executed.

The profiler records every operator. For kernels of ``scaled_dot_product_attention`` (SDPA), the recorded operators
show whether the reported kernel ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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


@contextmanager
def witness() -> Iterator[Counter[str]]:
    """Context manager that counts the forward runs of each SDPA kernel. The counts are complete on exit."""
    ran: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield ran
    for event in profile.key_averages():
        if event.key in _OPERATORS:
            ran[_OPERATORS[event.key]] += event.count


def claimed(reported: Iterable[str]) -> frozenset[str]:
    """Return the kernels of SDPA among the reported kernels. A report may join names, as in ``"flash+math"``."""
    names = (name for kernels in reported for name in kernels.split("+"))
    return frozenset(_CLAIMS[name] for name in names if name in _CLAIMS)


def false_claims(reported: Iterable[str], ran: Iterable[str]) -> tuple[str, ...]:
    """Return the SDPA kernels that a backend reported, but that did not run."""
    return tuple(sorted(claimed(reported) - set(ran)))
