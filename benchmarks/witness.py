"""A witness of what ran that trusts no backend: PyTorch's profiler, which sees every operator by name.

Backends report the kernel themselves, as nobody else can name it. Where they claim one of those behind
``scaled_dot_product_attention``, the claim can be checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

# The operators behind torch.nn.functional.scaled_dot_product_attention, and what backends call them.
_OPERATORS = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_attention_math": "math",
}
# Names that claim one of them.
_CLAIMS = {"flash": "flash", "flash_cpu": "flash", "efficient": "efficient", "cudnn": "cudnn", "math": "math"}


@contextmanager
def witness() -> Iterator[Counter[str]]:
    """How often each kernel behind ``scaled_dot_product_attention`` runs forward; filled when the block ends."""
    ran: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield ran
    for event in profile.key_averages():
        if event.key in _OPERATORS:
            ran[_OPERATORS[event.key]] += event.count


def claimed(reported: Iterable[str]) -> frozenset[str]:
    """The kernels behind ``scaled_dot_product_attention`` that reported names (``"flash+math"``) claim."""
    names = (name for kernels in reported for name in kernels.split("+"))
    return frozenset(_CLAIMS[name] for name in names if name in _CLAIMS)


def false_claims(reported: Iterable[str], ran: Iterable[str]) -> tuple[str, ...]:
    """The kernels that are claimed by the reported names, and did not run."""
    return tuple(sorted(claimed(reported) - set(ran)))
