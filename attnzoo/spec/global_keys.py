"""Per-sample global keys: keys every query sees, at any positions, any number per sample (Longformer, LED, ETC)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.spec.transforms import readable


class GlobalKeys(NamedTuple):
    """Where the global tokens of a batch are.

    Attributes:
        positions: ``(batch, most)``, each sample's own first; the rest is filler.
        valid: ``(batch, most)`` bool, False for filler.
    """

    positions: Tensor
    valid: Tensor

    def take(self, tensor: Tensor) -> Tensor:
        """Rows at the global positions: ``(batch, heads, length, dim)`` to ``(batch, heads, most, dim)``."""
        index = self.positions[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)


def find_global_keys(is_global: Tensor) -> GlobalKeys | None:
    """Find the global tokens of ``is_global`` ``(batch, length)`` bool, None for none. Waits for the device.

    Under ``vmap`` nobody can count them, and each token has a place.
    """
    counts = is_global.sum(1)
    most = int(counts.max()) if readable(counts) else is_global.shape[1]
    if most == 0:
        return None
    index = torch.argsort(~is_global, dim=1, stable=True)[:, :most]
    return GlobalKeys(index, torch.arange(most, device=is_global.device) < counts[:, None])
