"""``blocked-local``: dense attention keeps to a sliding window, and to the first few tokens of each sample.

``attnzoo.patch(model, backend="blocked-local", window=1024, sinks=4)``. A causal query sees the last ``window`` keys,
its own included, as in Mistral (Jiang et al. 2023, arXiv:2310.06825); where attention is not causal, it sees the
``window - 1`` keys on either side of it. The first ``sinks`` keys that the masks show a query stay visible for good, as
in StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): models park attention there. In a packed row these are the first
keys of the query's document. The window counts positions of the whole sequence, and the cache keeps all keys: decoding
with it gives what a forward without it gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.backend import Capabilities
from attnzoo.backends.approximate.base import ApproximateBackend, check_count
from attnzoo.backends.approximate.visible_keys import Standing, aligned_offset, first_keys, standing
from attnzoo.spec.bias import DenseBias
from attnzoo.spec.global_keys import find_global_keys
from attnzoo.spec.patterns import Causal, Full, Window
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest
from attnzoo.spec.transforms import TRANSFORMS


@dataclass(frozen=True, kw_only=True)
class BlockedLocalBackend(ApproximateBackend):
    """A sliding window, and attention sinks, in place of dense attention.

    Attributes:
        window: keys a query sees, its own included, on each side it looks to; at least 2. Dense attention needs it.
        sinks: how many of the first keys that the masks show a query it sees besides.
    """

    name: ClassVar[str] = "blocked-local"
    needed: ClassVar[tuple[str, ...]] = ("window",)
    example: ClassVar[Mapping[str, object]] = {"window": 8, "sinks": 2}
    # Not under vmap: where sinks are and where queries stand is read from the masks.
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
        found = [replace(segment, pattern=self._window(causal, offset))]
        if self.sinks:
            causal = causal and not segment.mask
            bias = None if segment.bias is None else DenseBias.kind
            pattern = Causal(-(self.window or 0)) if causal else Full()
            found.append(SegmentRequest(pattern, segment.kv_heads, False, not causal, bias, segment.bias_grad))
        return replace(request, segments=tuple(found))

    def rewrite_dense(self, attention: Attention, choices: Any) -> tuple[Segment, ...]:
        (segment,) = attention.segments
        place = standing(self.name, attention)
        window = self._window(place.causal, aligned_offset(place.position, attention.q_len, segment.kv_len))
        far = _sinks(attention, window, place, self.sinks) if self.sinks else None
        near = replace(segment, pattern=window)
        return (near,) if far is None else (near, far)


def _sinks(attention: Attention, window: Window, place: Standing, count: int) -> Segment | None:
    """The first ``count`` keys that each query is shown, to be seen by the queries whose window does not reach them.

    None if there are none.
    """
    (segment,) = attention.segments
    count = min(count, segment.kv_len)
    if segment.mask is not None:
        return _sinks_by_query(attention, segment.mask, window, place.position, count)
    real = place.real
    if real is None or bool(real[:, :count].all()):
        places, valid = torch.arange(count, device=segment.key.device)[None], None
        key, value = segment.key[:, :, :count], segment.value[:, :, :count]
    else:  # padding before the first of them: they are elsewhere in each sample
        found = find_global_keys((real & (real.cumsum(1) <= count)).expand(attention.batch, -1))
        if found is None:
            return None
        places, valid = found
        key, value = found.take(segment.key), found.take(segment.value)
    bias = _bias_at(attention, places)
    if window.right == 0 and valid is None:
        return Segment(key, value, Causal(place.position - window.left - 1), bias=bias)
    mask = _beyond(attention, window, place.position, places[:, None, None])
    return Segment(key, value, mask=mask if valid is None else mask & valid[:, None, None], bias=bias)


def _sinks_by_query(attention: Attention, grid: Tensor, window: Window, position: int, count: int) -> Segment | None:
    """The same where a dense mask shows each query keys of its own, as it does in a packed row.

    The keys are those that are a sink of some query and beyond its window. Of a packed row these are at most ``count``
    per document that is longer than the window.
    """
    (segment,) = attention.segments
    sinks, seen = first_keys(segment, grid, attention.q_len, count)
    seen = seen & _beyond(attention, window, position, sinks)
    spare = segment.kv_len  # where what is no sink is written to
    chosen = torch.zeros((len(sinks), spare + 1), dtype=torch.bool, device=sinks.device)
    chosen = chosen.scatter_(1, sinks.masked_fill(~seen, spare).flatten(1), True)[:, :spare]
    found = find_global_keys(chosen.expand(attention.batch, -1))
    if found is None:
        return None
    spare = found.positions.shape[1]
    places = (chosen.cumsum(1) - 1).gather(1, sinks.flatten(1)).view_as(sinks)
    mask = torch.zeros((*sinks.shape[:3], spare + 1), dtype=torch.bool, device=sinks.device)
    mask = mask.scatter_(3, places.masked_fill(~seen, spare), True)[..., :spare]
    bias = _bias_at(attention, found.positions)
    return Segment(found.take(segment.key), found.take(segment.value), mask=mask, bias=bias)


def _beyond(attention: Attention, window: Window, position: int, keys: Tensor) -> Tensor:
    """Which queries see keys beyond their window: bool, of the shape that keys ``(..., q_len or 1, m)`` broadcast to.

    Of a causal query these are the keys before its window; those after it are not beyond but hidden.
    """
    query = torch.arange(position, position + attention.q_len, device=keys.device)[:, None]
    before = keys < query - window.left
    return before if window.right == 0 else before | (keys > query + window.right)


def _bias_at(attention: Attention, places: Tensor) -> DenseBias | None:
    """The bias of keys at ``places`` ``(batch or 1, m)``."""
    (segment,) = attention.segments
    if segment.bias is None:
        return None
    samples = attention.batch if segment.bias.per_sample else 1
    sample, head, query = (torch.arange(n, device=places.device) for n in (samples, attention.heads, attention.q_len))
    add = segment.bias.gather(attention.q_len, segment.kv_len)
    b, h, q = sample[:, None, None, None], head[:, None, None], query[:, None]
    return DenseBias(add(b, h, q, places[:, None, None]))
