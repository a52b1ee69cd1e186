"""What models hand to their attention as ``attention_mask``, read back into patterns, masks and biases.

Models mask with finite numbers (``finfo.min``, ``-1e9``, ...), and write causality and padding out as one dense grid.
Nothing is lost in the reading: what is not a mask in an additive mask becomes a bias, and a grid is taken for
causality and padding only if it is exactly that. Under ``vmap`` nobody can look at the values
of a mask: there it stays dense.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.bias import DenseBias
from attnzoo.spec.documents import Pack, find_documents
from attnzoo.spec.patterns import Causal, Full, Pattern
from attnzoo.spec.segments import describe
from attnzoo.spec.transforms import readable

_ENTRIES_AT_ONCE = 1 << 24


class ReadMask(NamedTuple):
    """What a mask says, in the words of a segment.

    Attributes:
        pattern: ``Causal`` or ``Full``.
        key_mask: ``(batch, kv_len)`` bool, False for padding; or None.
        mask: dense ``(batch or 1, heads or 1, q_len, kv_len)`` bool, where pattern and key mask cannot say it; or None.
        bias: the finite additive rest, or None.
        documents: the documents of packed rows, where ``mask`` shows just those; or None.
    """

    pattern: Pattern
    key_mask: Tensor | None
    mask: Tensor | None
    bias: DenseBias | None
    documents: tuple[Pack, ...] | None = None


def read_attention_mask(attention_mask: Tensor, sizes: tuple[int, int, int], floor: float | None = None) -> ReadMask:
    """Read a 4-D ``attention_mask``: bool (True: visible) or additive.

    Args:
        attention_mask: ``(batch or 1, heads or 1, q_len or 1, kv_len or 1)``; PyTorch's attention repeats what is 1.
        sizes: ``(batch, q_len, kv_len)`` of the attention it is for.
        floor: additive values at or below it mean "not visible"; None: half of the dtype's most negative number.

    Raises:
        InvalidArgumentError: not a 4-D bool or floating-point tensor of these sizes, or NaN or +Inf in it (not under
            ``vmap``: there NaN and +Inf make the output NaN).
    """
    allowed = "a 4-D bool mask (True: visible) or additive floating-point mask without NaN and +Inf"
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4 or 0 in attention_mask.shape:
        raise InvalidArgumentError("attention_mask", describe(attention_mask), allowed)
    batch, *lengths = sizes
    if any(attention_mask.shape[dim] not in (1, size) for dim, size in zip((0, 2, 3), sizes, strict=True)):
        fits = f"(1 or {batch}, heads or 1, {lengths[0]}, {lengths[1]}), or 1 in place of a length"
        raise InvalidArgumentError("attention_mask", describe(attention_mask), fits)
    if attention_mask.dtype == torch.bool:
        visible = attention_mask.expand(-1, -1, *lengths)
        read = _structured(visible, batch) if readable(visible) else ReadMask(Full(), None, visible, None)
        # A copy, since what shares memory with the mask is not remembered and would be read again by every layer.
        return read if read.mask is None else read._replace(mask=read.mask.clone())
    if not attention_mask.is_floating_point():
        raise InvalidArgumentError("attention_mask", describe(attention_mask), allowed)
    hidden = attention_mask <= (torch.finfo(attention_mask.dtype).min / 2 if floor is None else floor)
    rest = attention_mask.masked_fill(hidden, 0.0)
    visible, bias = (~hidden).expand(-1, -1, *lengths), DenseBias(rest.expand(-1, -1, *lengths))
    if not readable(attention_mask):  # NaN and +Inf cannot be refused: they stay in the bias, and reach the output
        return ReadMask(Full(), None, visible, bias)
    if bool(attention_mask.isnan().any()):
        raise InvalidArgumentError("attention_mask", f"{describe(attention_mask)} with NaN in it", allowed)
    if not bool(rest.isfinite().all()):
        raise InvalidArgumentError("attention_mask", f"{describe(attention_mask)} with +Inf in it", allowed)
    return _structured(visible, batch)._replace(bias=bias if bool((rest != 0).any()) else None)


def _structured(visible: Tensor, batch: int) -> ReadMask:
    """What is visible, without a dense mask if it is causality and padding; with the documents if it is packed rows."""
    if visible.shape[1] != 1:
        return ReadMask(Full(), None, visible, None)
    grid = visible[:, 0]
    q_len, kv_len = grid.shape[1:]
    real = grid.any(1)
    key_mask = None if bool(real.all()) else real.expand(batch, -1)
    # With the last query of some sample real, the last key it sees tells where it stands.
    last = kv_len - 1 - int(grid[:, -1].any(0).flip(0).byte().argmax())
    offsets = dict.fromkeys((last - (q_len - 1), kv_len - q_len, 0)) if q_len > 1 else {}
    for pattern in (Full(), *(Causal(None if offset == kv_len - q_len != 0 else offset) for offset in offsets)):
        if _shows(pattern, real, grid):
            return ReadMask(pattern, key_mask, None, None)
    return ReadMask(Full(), None, visible, None, find_documents(grid, batch))


def _shows(pattern: Pattern, real: Tensor, grid: Tensor) -> bool:
    """Whether pattern and real keys ``(batch, kv_len)`` show exactly a grid ``(batch, q_len, kv_len)``."""
    samples, q_len, kv_len = grid.shape
    zero, key = real.new_zeros((), dtype=torch.long), torch.arange(kv_len, device=grid.device)
    seen, start = pattern.mask_mod(q_len, kv_len), 0
    for rows in grid.split(max(1, _ENTRIES_AT_ONCE // (samples * kv_len)), dim=1):
        query = torch.arange(start, start + rows.shape[1], device=grid.device)
        if not torch.equal(seen(zero, zero, query[:, None], key) & real[:, None], rows):
            return False
        start += rows.shape[1]
    return True
