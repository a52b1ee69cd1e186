"""Patch points of modules that compute no attention but use more memory than necessary.

``patch`` patches such a module together with the attention modules around it or inside it. This changes memory use and
error messages, never results. If other code has replaced the forward of such a module, ``patch`` leaves it unpatched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend, PatchPoint
from attnzoo.originals import slots
from attnzoo.originals.fingerprint import object_at

# Minimum tokens per slice. The hidden layers of such a slice need tens of MiB, and slices of this size cost no time.
TOKENS_AT_ONCE = 2048


class CompanionPoint(PatchPoint):
    """Patch point of a module that computes no attention. A module whose forward was replaced stays unpatched."""

    attends = False

    def serves(self, module: Any) -> bool:
        return type(module).forward is object_at(f"{self.cls}.forward") and not slots.is_foreign(module)


class FeedForwardPoint(CompanionPoint):
    """Patch point of a module that computes each token separately. The original forward runs on slices of tokens.

    If gradients are enabled, slices would save no memory, because autograd keeps the intermediate tensors of all
    slices. In training mode, slices would get other dropout masks. In a graph of ``torch.compile``, another number of
    slices would need another graph. In these cases, the forward runs on all tokens at once.
    """

    traceable = True

    def describe(self, module: Any) -> str:
        return "feeds forward in slices"

    def forward(self, module: Any, attend: Attend, states: Tensor) -> Tensor:
        """Return the original output for ``states`` ``(batch, length, embed)``."""
        original, count = type(module).forward, states.shape[1] // TOKENS_AT_ONCE
        if torch.compiler.is_compiling() or count < 2 or torch.is_grad_enabled() or module.training:
            output: Tensor = original(module, states)
            return output
        return torch.cat([original(module, part) for part in states.tensor_split(count, dim=1)], dim=1)
