"""What models hand to their attention as ``attention_mask``, read back into masks and biases.

Models mask with finite numbers (``finfo.min``, ``-1e9``, ...). Nothing is lost in the reading: what is not a mask in
an additive mask becomes a bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.bias import DenseBias
from attnzoo.errors import InvalidArgumentError
from attnzoo.segments import describe


class ReadMask(NamedTuple):
    """A dense mask and bias, each ``(batch or 1, heads or 1, q_len, kv_len)`` or None."""

    mask: Tensor | None
    bias: DenseBias | None


def read_attention_mask(
    attention_mask: Tensor, floor: float | None = None, lengths: tuple[int, int] | None = None
) -> ReadMask:
    """Read a 4-D ``attention_mask``: bool (True: visible) or additive.

    Args:
        attention_mask: ``(batch or 1, heads or 1, q_len, kv_len)``.
        floor: additive values at or below it mean "not visible"; None: half of the dtype's most negative number.
        lengths: ``(q_len, kv_len)`` the mask has to have; None: any.

    Returns:
        The mask (None if it hides nothing) and the finite additive rest as a bias (None if there is none).

    Raises:
        InvalidArgumentError: not a 4-D bool or floating-point tensor, or NaN in it.
    """
    allowed = "a 4-D bool mask (True: visible) or additive floating-point mask without NaN"
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
        raise InvalidArgumentError("attention_mask", describe(attention_mask), allowed)
    if lengths is not None and attention_mask.shape[2:] != lengths:
        raise InvalidArgumentError("attention_mask", describe(attention_mask), f"(batch or 1, heads or 1, *{lengths})")
    if attention_mask.dtype == torch.bool:
        return ReadMask(attention_mask, None)
    if not attention_mask.is_floating_point():
        raise InvalidArgumentError("attention_mask", describe(attention_mask), allowed)
    if bool(attention_mask.isnan().any()):
        raise InvalidArgumentError("attention_mask", f"{describe(attention_mask)} with NaN in it", allowed)
    visible = attention_mask > (torch.finfo(attention_mask.dtype).min / 2 if floor is None else floor)
    rest = attention_mask.masked_fill(~visible, 0.0)
    bias = DenseBias(rest) if bool((rest != 0).any()) else None
    return ReadMask(None if bool(visible.all()) else visible, bias)
