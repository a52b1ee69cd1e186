"""One row for the padding masks that Longformer and LED make around their encoders.

Both models expand their padding mask to ``(batch, 1, length, length)`` and then read row 0 of it (``[:, 0, 0, :]``).
All rows are equal, but the grid and the temporaries on the way to it take several times ``4 * length**2`` bytes per
sample: 4 GiB of the 4.3 GiB that a whole LED needs at 16384 tokens. The point runs the model's own forward with one
global name rebound: the function that makes the mask makes one row. Every layer gets the same ``(batch, length)`` mask,
whether it is patched or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnzoo.adapter import Attend, Forward, PatchPoint
from attnzoo.patching.companions import companion
from attnzoo.patching.interface import rebind
from attnzoo.patching.mask_arguments import ENCODER_MASK, checking

_MASKS = {"attention_mask": ENCODER_MASK, "global_attention_mask": ENCODER_MASK}
MaskFunction = Callable[..., Any]
OneRow = Callable[[MaskFunction], MaskFunction]


def mask_seam(cls: str, name: str, one_row: OneRow, verified: Mapping[str, tuple[str, ...]]) -> PatchPoint:
    """Return the point of a module that makes a square mask and reads one row of it; it checks what users give, too.

    Args:
        cls: ``"package.module:Class"`` of the module.
        name: the global name under which its forward calls the function that makes the mask.
        one_row: ``one_row(function)`` takes the arguments of that function and returns its mask with one row.
        verified: fingerprints, as :attr:`~attnzoo.adapter.PatchPoint.verified`.
    """

    def bind(original: Any, attend: Attend) -> Forward:
        make = original.forward.__globals__[name]
        return rebind(original.forward, **{name: one_row(make)})

    return companion(cls, checking(lambda module: _MASKS, bind), verified, "makes a padding mask of one row")
