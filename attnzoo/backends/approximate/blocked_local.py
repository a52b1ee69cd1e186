"""The backend ``blocked-local``, which replaces dense attention by a sliding window and attention sinks.

Example: ``attnzoo.patch(model, backend="blocked-local", window=1024, sinks=4)``.

A causal query sees the last ``window`` keys up to the position of the query, as in Mistral (Jiang et al. 2023,
arXiv:2310.06825). A non-causal query also sees the ``window - 1`` keys after this position. Every query also sees the
sinks: the first ``sinks`` keys that the masks allow. Models rely on sinks (StreamingLLM, Xiao et al. 2023,
arXiv:2309.17453). In a packed row, the sinks are the first keys of the query's document. The KV cache keeps all keys,
so decoding gives the same output as one forward over all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.backend import Capabilities
from attnzoo.backends.approximate.base import ApproximateBackend, check_count
from attnzoo.backends.approximate.visible_keys import QueryPlacement, first_keys, place_queries
from attnzoo.spec.bias import DenseBias
from attnzoo.spec.global_keys import find_global_keys
from attnzoo.spec.patterns import Causal, Full, Window
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest
from attnzoo.spec.transforms import TRANSFORMS


@dataclass(frozen=True, kw_only=True)
class BlockedLocalBackend(ApproximateBackend):
    """A backend that replaces dense attention by a sliding window and attention sinks.

    Attributes:
        window: how many keys a query sees up to its position, including the key at its position. At least 2. If the
            attention is not causal, the query also sees the `window - 1` keys after its position.
        sinks: how many of the first visible keys each query sees in addition to the window.

    Example:
        >>> import torch, attnzoo
        >>> q, k, v = torch.randn(3, 1, 2, 16, 8)
        >>> backend = attnzoo.configure("blocked-local", window=4, sinks=1)
        >>> attnzoo.attention(q, k, v, attnzoo.Causal(), backend=backend).shape
        torch.Size([1, 2, 16, 8])
    """

    name: ClassVar[str] = "blocked-local"
    needed: ClassVar[tuple[str, ...]] = ("window",)
    example: ClassVar[Mapping[str, object]] = {"window": 8, "sinks": 2}
    # This backend refuses vmap, because Python reads the positions of sinks and queries from the masks.
    capabilities: ClassVar[Capabilities] = replace(ApproximateBackend.capabilities, transforms=TRANSFORMS - {"vmap"})

    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            check_count(self.name, "window", self.window, 2)
        check_count(self.name, "sinks", self.sinks, 0)

    def describe(self, request: Request) -> str:
        sinks = f" and {self.sinks} sinks" if self.sinks else ""
        return f"window of {self.window} keys{sinks}"

    def _window(self, causal: bool, offset: int | None) -> Window:
        reach = (self.window or 0) - 1
        return Window(reach, 0 if causal else reach, offset)

    def rewrite_request(self, request: Request) -> Request:
        (segment,) = request.segments
        offset = segment.pattern.offset if isinstance(segment.pattern, Causal) else None
        causal = isinstance(segment.pattern, Causal)
        segments = [replace(segment, pattern=self._window(causal, offset))]
        if self.sinks:
            causal = causal and not segment.mask
            bias = None if segment.bias is None else DenseBias.kind
            pattern = Causal(-(self.window or 0)) if causal else Full()
            segments.append(SegmentRequest(pattern, segment.kv_heads, False, not causal, bias, segment.bias_grad))
        return replace(request, segments=tuple(segments))

    def rewrite_dense(self, attention: Attention, decisions: Any) -> tuple[Segment, ...]:
        (segment,) = attention.segments
        placement = place_queries(self.name, attention)
        window = self._window(placement.causal, placement.offset)
        near = replace(segment, pattern=window)
        sinks = _sinks(attention, window, placement, self.sinks) if self.sinks else None
        return (near,) if sinks is None else (near, sinks)


def _sinks(attention: Attention, window: Window, placement: QueryPlacement, count: int) -> Segment | None:
    """Return a segment with the first ``count`` visible keys, or None if no key is visible.

    The mask or pattern of this segment hides the sinks that are in the window of a query, because the query already
    sees them in the segment of the window.
    """
    (segment,) = attention.segments
    count = min(count, segment.kv_len)
    if segment.mask is not None:
        return _sinks_by_query(attention, segment.mask, window, placement.position, count)
    visible = placement.visible
    if visible is None or bool(visible[:, :count].all()):
        positions, valid = torch.arange(count, device=segment.key.device)[None], None
        key, value = segment.key[:, :, :count], segment.value[:, :, :count]
    else:  # padding on the left: the positions differ between samples
        sinks = find_global_keys((visible & (visible.cumsum(1) <= count)).expand(attention.batch, -1))
        if sinks is None:
            return None
        positions, valid = sinks
        key, value = sinks.take(segment.key), sinks.take(segment.value)
    bias = _bias_at(attention, positions)
    if window.right == 0 and valid is None:
        return Segment(key, value, Causal(placement.position - window.left - 1), bias=bias)
    mask = _outside(attention, window, placement.position, positions[:, None, None])
    return Segment(key, value, mask=mask if valid is None else mask & valid[:, None, None], bias=bias)


def _sinks_by_query(attention: Attention, mask: Tensor, window: Window, position: int, count: int) -> Segment | None:
    """Return the segment of sinks for an attention with a dense mask, where the sinks may differ between queries.

    The segment contains every key that is a sink of at least one query and outside the window of this query. In a
    packed row, the segment contains at most ``count`` keys per document.
    """
    (segment,) = attention.segments
    sinks, seen = first_keys(segment, mask, attention.q_len, count)
    seen = seen & _outside(attention, window, position, sinks)
    unused = segment.kv_len  # index of an extra column for the entries that are not sinks
    chosen = torch.zeros((len(sinks), unused + 1), dtype=torch.bool, device=sinks.device)
    chosen = chosen.scatter_(1, sinks.masked_fill(~seen, unused).flatten(1), True)[:, :unused]
    chosen_keys = find_global_keys(chosen.expand(attention.batch, -1))
    if chosen_keys is None:
        return None
    unused = chosen_keys.positions.shape[1]
    columns = (chosen.cumsum(1) - 1).gather(1, sinks.flatten(1)).view_as(sinks)
    visible = torch.zeros((*sinks.shape[:3], unused + 1), dtype=torch.bool, device=sinks.device)
    visible = visible.scatter_(3, columns.masked_fill(~seen, unused), True)[..., :unused]
    bias = _bias_at(attention, chosen_keys.positions)
    return Segment(chosen_keys.take(segment.key), chosen_keys.take(segment.value), mask=visible, bias=bias)


def _outside(attention: Attention, window: Window, position: int, keys: Tensor) -> Tensor:
    """Return which keys are outside the window of each query, bool ``(..., q_len, m)``.

    ``keys`` are key indices, broadcastable to this shape. ``position`` is the position of query 0 in the key sequence.
    For a causal window, the result is True only for keys before the window. A causal query sees no key after it anyway.
    """
    query = torch.arange(position, position + attention.q_len, device=keys.device)[:, None]
    before = keys < query - window.left
    return before if window.right == 0 else before | (keys > query + window.right)


def _bias_at(attention: Attention, positions: Tensor) -> DenseBias | None:
    """Return the bias for all queries and the keys at ``positions`` ``(batch or 1, m)``, or None without a bias."""
    queries = torch.arange(attention.q_len, device=positions.device)
    values = attention.segments[0].bias_at(queries, positions, attention.q_len)
    return None if values is None else DenseBias(values)
