"""Did the kernel run that the backend reported? PyTorch's profiler is the witness: it sees every operator by name.

Only the backend can name its kernel. Where it names one of the kernels behind ``scaled_dot_product_attention``, the
operators that ran confirm or refute the name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

# Operators behind torch.nn.functional.scaled_dot_product_attention -> the kernel that each one proves.
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
    """Count the forward runs of each kernel behind ``scaled_dot_product_attention``; filled when the block ends."""
    ran: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield ran
    for event in profile.key_averages():
        if event.key in _OPERATORS:
            ran[_OPERATORS[event.key]] += event.count


def claimed(reported: Iterable[str]) -> frozenset[str]:
    """Return the kernels behind ``scaled_dot_product_attention`` that reported names (``"flash+math"``) claim."""
    names = (name for kernels in reported for name in kernels.split("+"))
    return frozenset(_CLAIMS[name] for name in names if name in _CLAIMS)


def false_claims(reported: Iterable[str], ran: Iterable[str]) -> tuple[str, ...]:
    """Return the kernels that the reported names claim and that did not run."""
    return tuple(sorted(claimed(reported) - set(ran)))
