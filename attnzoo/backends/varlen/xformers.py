"""``xformers``: memory-efficient attention of the ``xformers`` package, by its structured biases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from attnzoo.backend import Capabilities
from attnzoo.backends.varlen.kernels import Kernel
from attnzoo.backends.varlen.packed import CAPABILITIES, PackedBackend
from attnzoo.backends.varlen.xformers_kernels import XformersCutlassKernel, XformersFlashKernel


@dataclass(frozen=True)
class XformersBackend(PackedBackend):
    """Memory-efficient attention."""

    name: ClassVar[str] = "xformers"
    priority: ClassVar[int] = 5
    kernels: ClassVar[tuple[type[Kernel], ...]] = (XformersFlashKernel, XformersCutlassKernel)
    capabilities: ClassVar[Capabilities] = replace(
        CAPABILITIES, dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16})
    )
