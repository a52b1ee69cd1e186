"""``flash_attention_2``: FlashAttention 2 from the package ``flash_attn``, or else from PyTorch's own kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attnzoo.backend import Capabilities
from attnzoo.backends.varlen.flash_attn_kernel import FlashAttnKernel
from attnzoo.backends.varlen.kernels import PackedKernel
from attnzoo.backends.varlen.packed import CAPABILITIES, PackedBackend
from attnzoo.backends.varlen.varlen_kernel import VarlenKernel


@dataclass(frozen=True)
class FlashBackend(PackedBackend):
    """FlashAttention 2 for packed sequences."""

    name: ClassVar[str] = "flash_attention_2"
    aliases: ClassVar[tuple[str, ...]] = ("flash", "fa2")
    priority: ClassVar[int] = 20
    kernels: ClassVar[tuple[type[PackedKernel], ...]] = (FlashAttnKernel, VarlenKernel)
    # The kernel flash_attn supports dropout, and the kernel varlen refuses dropout.
    capabilities: ClassVar[Capabilities] = replace(CAPABILITIES, dropout=True)
