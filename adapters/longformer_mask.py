"""Build padding masks that have only one row, for Longformer and for the encoder of LED.

Both models expand their padding mask to ``(batch, 1, length, length)`` and then read only row 0 (``[:, 0, 0, :]``). All
rows are equal, but the expanded mask and its temporaries need several times ``4 * length**2`` bytes per sample. An LED
with 16384 tokens needs 4.3 GiB, of which the mask needs 4 GiB. The patch point runs the model's original forward with a
mask function that builds one row. Every layer gets the same ``(batch, length)`` mask as without a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnzoo.adapter import Attend, Forward
from attnzoo.patching.interface import rebind
from attnzoo.patching.mask_arguments import ENCODER_MASK, MaskCheckPoint

MaskFunction = Callable[..., Any]


class OneRowMaskPoint(MaskCheckPoint):
    """Patch point of a module that builds a square mask but reads only row 0. The point also checks mask arguments.

    Attributes:
        mask_function: the name of the global function that the module's forward calls to build the mask.
    """

    masks = {"attention_mask": ENCODER_MASK, "global_attention_mask": ENCODER_MASK}
    mask_function: str

    def one_row(self, make: MaskFunction) -> MaskFunction:
        """Return a function that takes the arguments of the mask function ``make``, but returns a mask with one row."""
        raise NotImplementedError

    def describe(self, module: Any) -> str:
        return "makes a padding mask of one row"

    def bind_checked(self, cls: Any, attend: Attend) -> Forward:
        make = cls.forward.__globals__[self.mask_function]
        return rebind(cls.forward, **{self.mask_function: self.one_row(make)})
