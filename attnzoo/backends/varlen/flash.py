"""``flash_attention_2``: FlashAttention 2 by the ``flash_attn`` package, otherwise by PyTorch's built-in kernels."""

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
    """FlashAttention 2."""

    name: ClassVar[str] = "flash_attention_2"
    aliases: ClassVar[tuple[str, ...]] = ("flash", "fa2")
    priority: ClassVar[int] = 20
    kernels: ClassVar[tuple[type[PackedKernel], ...]] = (FlashAttnKernel, VarlenKernel)
    # flash_attn has dropout; varlen refuses it.
    capabilities: ClassVar[Capabilities] = replace(CAPABILITIES, dropout=True)
