"""Functions that convert the ``attention_mask`` of a model into a pattern, masks and a bias.

Models hide keys with finite numbers (``finfo.min``, ``-1e9``, ...), and combine causality and padding in one mask. The
conversion is exact. Values of an additive mask that hide no key become a bias. The dense mask becomes a pattern and a
key mask only if both together hide exactly the same keys. A mask under ``vmap`` stays dense, as Python cannot read it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.bias import DenseBias
from attnzoo.spec.documents import Pack, find_documents
from attnzoo.spec.patterns import Causal, Full, Pattern, Window
from attnzoo.spec.segments import Segment, describe
from attnzoo.spec.transforms import readable

_ENTRIES_AT_ONCE = 1 << 24


class ReadMask(NamedTuple):
    """The fields of a segment that are together equivalent to an attention mask.

    Attributes:
        pattern: ``Full``, ``Causal`` or ``Window``.
        key_mask: ``(batch, kv_len)`` bool, False for padding. None means that there is no padding.
        mask: ``(batch or 1, heads or 1, q_len, kv_len)`` bool. None means that pattern and key mask are sufficient.
        bias: the values of an additive mask at visible keys. None if the mask is bool, or if all these values are 0 and
            need no gradient.
        documents: the documents of packed rows. None means that ``mask`` is not the mask of packed rows.
    """

    pattern: Pattern
    key_mask: Tensor | None
    mask: Tensor | None
    bias: DenseBias | None
    documents: tuple[Pack, ...] | None = None


NO_MASK = ReadMask(Full(), None, None, None)


def read_attention_mask(attention_mask: Tensor, sizes: tuple[int, int, int], floor: float | None = None) -> ReadMask:
    """Convert a 4-D bool or additive ``attention_mask`` into a pattern, masks and a bias.

    Args:
        attention_mask: ``(batch or 1, heads or 1, q_len or 1, kv_len or 1)``. In a bool mask, True means visible.
        sizes: the sizes ``(batch, q_len, kv_len)`` of the attention.
        floor: the largest additive value that hides a key. None means half of the dtype's most negative number.

    Raises:
        InvalidArgumentError: the mask is not a 4-D bool or floating-point tensor of these sizes, or contains NaN or
            +Inf. Under ``vmap``, NaN and +Inf raise no error and make the output NaN.

    Example:
        >>> import torch, attnzoo
        >>> read = attnzoo.read_attention_mask(torch.ones(4, 4, dtype=torch.bool).tril()[None, None], (1, 4, 4))
        >>> read.pattern, read.mask
        (Causal(offset=0), None)
    """
    allowed = "a non-empty 4-D mask: bool (True: visible), or floats to add to the scores, without NaN and +Inf"
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4 or 0 in attention_mask.shape:
        raise InvalidArgumentError("attention_mask", describe(attention_mask), allowed)
    batch, *lengths = sizes
    if any(attention_mask.shape[dim] not in (1, size) for dim, size in zip((0, 2, 3), sizes, strict=True)):
        fits = f"shape (1 or {batch}, 1 or heads, 1 or {lengths[0]}, 1 or {lengths[1]})"
        raise InvalidArgumentError("attention_mask", describe(attention_mask), fits)
    # A mask that requires grad is a bias even if all its values are 0, as in tables at the start of training.
    if not attention_mask.requires_grad and readable(attention_mask) and _hides_nothing(attention_mask):
        return NO_MASK
    if attention_mask.dtype == torch.bool:
        visible = attention_mask.expand(-1, -1, *lengths)
        read = _simplify(visible, batch) if readable(visible) else ReadMask(Full(), None, visible, None)
        # Copy the mask: a result that shares memory with the mask is not cached, so every layer would convert it again.
        return read if read.mask is None else read._replace(mask=read.mask.clone())
    if not attention_mask.is_floating_point():
        raise InvalidArgumentError("attention_mask", describe(attention_mask), allowed)
    hidden = attention_mask <= (torch.finfo(attention_mask.dtype).min / 2 if floor is None else floor)
    rest = attention_mask.masked_fill(hidden, 0.0)
    visible, bias = (~hidden).expand(-1, -1, *lengths), DenseBias(rest.expand(-1, -1, *lengths))
    if not readable(attention_mask):
        return ReadMask(Full(), None, visible, bias)
    if bool(attention_mask.isnan().any()):
        raise InvalidArgumentError("attention_mask", f"{describe(attention_mask)}, with NaN", allowed)
    if not bool(rest.isfinite().all()):
        raise InvalidArgumentError("attention_mask", f"{describe(attention_mask)}, with +Inf", allowed)
    return _simplify(visible, batch)._replace(bias=bias if rest.requires_grad or bool((rest != 0).any()) else None)


def read_dense_mask(segment: Segment, batch: int) -> Segment:
    """Return an equivalent segment whose dense mask is a pattern and a key mask, if this is possible.

    A graph of ``torch.compile`` passes every mask on as a dense mask, because it cannot read values, and the rest of an
    additive mask as a bias that is usually 0.
    """
    if segment.mask is None or segment.key_mask is not None or not isinstance(segment.pattern, Full):
        return segment
    bias, read = segment.bias, _simplify(segment.mask, batch)
    if isinstance(bias, DenseBias) and not bias.values.requires_grad and not bool(bias.values.any()):
        bias = None
    pattern = segment.pattern if isinstance(read.pattern, Full) else read.pattern
    return replace(segment, pattern=pattern, key_mask=read.key_mask, mask=read.mask, bias=bias)


def _hides_nothing(mask: Tensor) -> bool:
    """Whether a bool mask is True everywhere, or an additive mask is 0 everywhere, as in most decoding steps.

    The result for a mask with NaN is False, because ``any`` treats NaN as True.
    """
    if mask.dtype == torch.bool:
        return bool(mask.all())
    return mask.is_floating_point() and not bool(mask.any())


def _simplify(visible: Tensor, batch: int) -> ReadMask:
    """Return a pattern and a key mask that together hide the same keys as ``visible``, or else ``visible`` itself."""
    if visible.shape[1] != 1:
        return ReadMask(Full(), None, visible, None)
    grid = visible[:, 0]
    q_len, kv_len = grid.shape[1:]
    real = grid.any(1)
    key_mask = None if bool(real.all()) else real.expand(batch, -1)
    if q_len == 1:  # the mask of one query is a key mask
        return ReadMask(Full(), key_mask, None, None)
    # Find the offset. In a causal mask, the last key that the last query sees has the position of this query. (This
    # needs a sample whose last query is not padding.)
    last = kv_len - 1 - int(grid[:, -1].any(0).flip(0).byte().argmax())
    offsets = dict.fromkeys((last - (q_len - 1), kv_len - q_len, 0))
    for pattern in (Full(), *(Causal(None if offset == kv_len - q_len != 0 else offset) for offset in offsets)):
        if _shows_exactly(pattern, real, grid):
            return ReadMask(pattern, key_mask, None, None)
    window = _narrowest_window(grid)
    if window is not None and _shows_exactly(window, real, grid):
        return ReadMask(window, key_mask, None, None)
    return ReadMask(Full(), None, visible, None, find_documents(grid, batch))


def _narrowest_window(grid: Tensor) -> Window | None:
    """Return the narrowest window with all visible keys, or None if no key is visible or the window has width 1."""
    q_len, kv_len = grid.shape[1:]
    lowest, highest, start = kv_len, -q_len, 0
    for rows in grid.split(max(1, _ENTRIES_AT_ONCE // (grid.shape[0] * kv_len)), dim=1):
        query = torch.arange(start, start + rows.shape[1], device=grid.device)
        has_visible_key, first = rows.any(-1), rows.byte().argmax(-1)
        last = kv_len - 1 - rows.flip(-1).byte().argmax(-1)
        lowest = min(lowest, int(torch.where(has_visible_key, first - query, kv_len).min()))
        highest = max(highest, int(torch.where(has_visible_key, last - query, -q_len).max()))
        start += rows.shape[1]
    if lowest >= highest:
        return None
    shift = kv_len - q_len
    if lowest <= shift <= highest:
        return Window(shift - lowest, highest - shift)
    return Window(highest - lowest, 0, offset=highest)


def _shows_exactly(pattern: Pattern, real: Tensor, grid: Tensor) -> bool:
    """Whether a pattern and a key mask ``(batch, kv_len)`` together equal a dense mask ``(batch, q_len, kv_len)``."""
    samples, q_len, kv_len = grid.shape
    zero, key = real.new_zeros((), dtype=torch.long), torch.arange(kv_len, device=grid.device)
    mask, start = pattern.mask_mod(q_len, kv_len), 0
    for rows in grid.split(max(1, _ENTRIES_AT_ONCE // (samples * kv_len)), dim=1):
        query = torch.arange(start, start + rows.shape[1], device=grid.device)
        if not torch.equal(mask(zero, zero, query[:, None], key) & real[:, None], rows):
            return False
        start += rows.shape[1]
    return True
