"""Global keys are keys that every query sees. A sample may have any number of global keys at any positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.spec.transforms import readable


class GlobalKeys(NamedTuple):
    """The positions of the global keys of each sample.

    Attributes:
        positions: ``(batch, most)`` int64. ``most`` is the largest number of global keys in a sample.
        valid: ``(batch, most)`` bool, False for padding entries of ``positions``.
    """

    positions: Tensor
    valid: Tensor

    def take(self, tensor: Tensor) -> Tensor:
        """Return the rows at :attr:`positions` of ``(batch, heads, length, dim)`` as ``(batch, heads, most, dim)``."""
        index = self.positions[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)


def find_global_keys(is_global: Tensor) -> GlobalKeys | None:
    """Return the positions where ``is_global`` ``(batch, length)`` bool is True, or None if no entry is True.

    Python reads the size ``most`` of the result from the device, and waits for it. Under ``vmap`` Python cannot read
    this number, so ``most`` is ``length``.
    """
    counts = is_global.sum(1)
    most = int(counts.max()) if readable(counts) else is_global.shape[1]
    if most == 0:
        return None
    positions = torch.argsort(~is_global, dim=1, stable=True)[:, :most]
    return GlobalKeys(positions, torch.arange(most, device=is_global.device) < counts[:, None])
