"""Patch points of modules around attention, which compute no attention but use more memory than necessary.

``patch`` takes over such a module together with the attention it belongs to. This changes memory and error messages,
never results. A module whose forward a subclass or another library has replaced is therefore left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend, PatchPoint
from attnzoo.originals import slots
from attnzoo.originals.fingerprint import object_at

# The smallest slice. Its hidden layers fit in tens of MiB, and matrix products are as fast as on all tokens at once.
TOKENS_AT_ONCE = 2048


class CompanionPoint(PatchPoint):
    """A module that computes no attention and may keep its original forward."""

    attends = False

    def serves(self, module: Any) -> bool:
        return type(module).forward is object_at(f"{self.cls}.forward") and not slots.is_foreign(module)


class FeedForwardPoint(CompanionPoint):
    """A module that treats all tokens alike and runs its original forward on slices of tokens.

    All tokens go at once with gradients, which keep the hidden layers of all tokens anyway, and in training, where
    dropout would draw other numbers.
    """

    def describe(self, module: Any) -> str:
        return "feeds forward in slices"

    def forward(self, module: Any, attend: Attend, states: Tensor) -> Tensor:
        """Return the original output for ``states`` ``(batch, length, embed)``."""
        original, count = type(module).forward, states.shape[1] // TOKENS_AT_ONCE
        if count < 2 or torch.is_grad_enabled() or module.training:
            output: Tensor = original(module, states)
            return output
        return torch.cat([original(module, part) for part in states.tensor_split(count, dim=1)], dim=1)
