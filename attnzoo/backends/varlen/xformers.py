"""The backend ``xformers``: memory-efficient attention of the package ``xformers``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attnzoo.backend import Capabilities
from attnzoo.backends.varlen.kernels import PackedKernel
from attnzoo.backends.varlen.packed import CAPABILITIES, PackedBackend
from attnzoo.backends.varlen.xformers_kernels import XformersCutlassKernel, XformersFlashKernel


@dataclass(frozen=True)
class XformersBackend(PackedBackend):
    """Memory-efficient attention of the package ``xformers``."""

    name: ClassVar[str] = "xformers"
    priority: ClassVar[int] = 5
    kernels: ClassVar[tuple[type[PackedKernel], ...]] = (XformersFlashKernel, XformersCutlassKernel)
    capabilities: ClassVar[Capabilities] = replace(CAPABILITIES, dtypes=XformersCutlassKernel.dtypes)
