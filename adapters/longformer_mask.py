"""Padding masks of one row, for the models around the encoders of Longformer and LED.

Both models expand their padding mask to ``(batch, 1, length, length)`` and then read row 0 of it (``[:, 0, 0, :]``).
All rows are equal, but the grid and the temporaries used to make it take several times ``4 * length**2`` bytes per
sample: 4 GiB of the 4.3 GiB that a whole LED needs at 16384 tokens. The patch point runs the model's original forward
with one global name rebound: the function that makes the mask makes one row. Every layer, patched or not, gets the same
``(batch, length)`` mask as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnzoo.adapter import Attend, Forward
from attnzoo.patching.interface import rebind
from attnzoo.patching.mask_arguments import ENCODER_MASK, MaskCheckPoint

MaskFunction = Callable[..., Any]


class OneRowMaskPoint(MaskCheckPoint):
    """A module that makes a square mask and reads one row of it. Its mask arguments are checked, too.

    Attributes:
        mask_function: the global name under which the module's forward calls the function that makes the mask.
    """

    masks = {"attention_mask": ENCODER_MASK, "global_attention_mask": ENCODER_MASK}
    mask_function: str

    def one_row(self, make: MaskFunction) -> MaskFunction:
        """Return a function with the arguments of ``make`` that returns its mask with one row."""
        raise NotImplementedError

    def describe(self, module: Any) -> str:
        return "makes a padding mask of one row"

    def bind_checked(self, cls: Any, attend: Attend) -> Forward:
        make = cls.forward.__globals__[self.mask_function]
        return rebind(cls.forward, **{self.mask_function: self.one_row(make)})
