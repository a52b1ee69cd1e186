"""Whether the Triton kernels run on this machine: a package may be installed and broken, or find no driver."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from attnzoo.backends.varlen.kernels import import_package
from attnzoo.errors import raise_interrupts
from attnzoo.spec.segments import Attention, Segment


@cache
def why_unusable(device: str) -> str | None:
    """Return why a small attention fails on a device, or None. It runs once per process, at the first question."""
    module, why = import_package("triton", "triton")
    if module is None:
        return why
    try:
        output = _small_attention(device)
        if bool((output == 1.0).all()):  # reading the result waits for the kernel
            return None
        return f"the kernels of triton {module.__version__} compute a wrong result on {device}"
    except BaseException as error:
        raise_interrupts(error)
        return f"triton {module.__version__} cannot run a kernel on {device}: {type(error).__name__}: {error}"


@torch.no_grad()
def _small_attention(device: str) -> Tensor:
    """Return an attention whose values, and so whose outputs, are all 1."""
    from attnzoo.backends.triton.attend import attend

    ones = torch.ones((1, 1, 1, 16), device=device)
    return attend(Attention(ones, (Segment(ones, ones),), 1.0))
