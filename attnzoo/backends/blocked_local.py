"""``blocked-local``: dense attention keeps to a sliding window, and to the first few tokens of each sample.

``attnzoo.patch(model, backend="blocked-local", window=1024, sinks=4)``. A causal query sees the last ``window`` keys,
its own included, as in Mistral (Jiang et al. 2023, arXiv:2310.06825); where attention is not causal, it sees the
``window - 1`` keys on either side of it. The first ``sinks`` real keys of a sample stay visible for good, as in
StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): models park attention there. Positions are those of the whole
sequence, and the cache keeps all keys: decoding with it gives what a forward without it gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.backends.rewriting import Rewriting, aligned_offset, check_count, first_position, real_keys
from attnzoo.bias import DenseBias
from attnzoo.globals import locate
from attnzoo.patterns import Causal, Full, Window
from attnzoo.segments import Attention, Request, Segment, SegmentRequest


@dataclass(frozen=True, kw_only=True)
class BlockedLocalBackend(Rewriting):
    """A sliding window, and attention sinks, in place of dense attention.

    Attributes:
        window: keys a query sees, its own included, on each side it looks to; at least 2. Dense attention needs it.
        sinks: how many of the first real keys of each sample every query sees besides.
    """

    name: ClassVar[str] = "blocked-local"
    needed: ClassVar[tuple[str, ...]] = ("window",)
    example: ClassVar[Mapping[str, object]] = {"window": 8, "sinks": 2}

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

    def _window(self, pattern: object, offset: int | None) -> Window:
        reach = (self.window or 0) - 1
        return Window(reach, 0 if isinstance(pattern, Causal) else reach, offset)

    def rewrite_request(self, request: Request) -> Request:
        (segment,) = request.segments
        offset = segment.pattern.offset if isinstance(segment.pattern, Causal) else None
        causal = isinstance(segment.pattern, Causal) and not segment.mask
        found = [replace(segment, pattern=self._window(segment.pattern, offset))]
        if self.sinks:
            bias = None if segment.bias is None else DenseBias.kind
            pattern = Causal(-(self.window or 0)) if causal else Full()
            found.append(SegmentRequest(pattern, segment.kv_heads, False, not causal, bias, segment.bias_grad))
        return replace(request, segments=tuple(found))

    def rewrite_dense(self, attention: Attention, choices: Any) -> tuple[Segment, ...]:
        (segment,) = attention.segments
        position = first_position(self.name, segment, attention.q_len)
        window = self._window(segment.pattern, aligned_offset(position, attention.q_len, segment.kv_len))
        far = _sinks(attention, window, position, self.sinks) if self.sinks else None
        near = replace(segment, pattern=window)
        return (near,) if far is None else (near, far)


def _sinks(attention: Attention, window: Window, position: int, count: int) -> Segment | None:
    """The first ``count`` real keys of each sample, to be seen by the queries whose window does not reach them.

    None if there are none. ``position`` is the key position of query 0.
    """
    (segment,) = attention.segments
    count, real = min(count, segment.kv_len), real_keys(segment)
    if real is not None and not bool(real[:, :count].all()):
        return _scattered_sinks(attention, window, position, real & (real.cumsum(1) <= count))
    key, value = segment.key[:, :, :count], segment.value[:, :, :count]
    places = torch.arange(count, device=key.device)[None]
    bias = _bias_at(attention, places)
    if window.right == 0 and segment.mask is None:
        return Segment(key, value, Causal(position - window.left - 1), bias=bias)
    mask = _beyond(attention, window, position, places)
    if segment.mask is not None:
        mask = mask & segment.mask[..., :count]
    return Segment(key, value, mask=mask, bias=bias)


def _scattered_sinks(attention: Attention, window: Window, position: int, chosen: Tensor) -> Segment | None:
    """Sinks ``chosen`` ``(batch or 1, kv_len)``, at positions of their own in each sample: there is padding before."""
    (segment,) = attention.segments
    found = locate(chosen.expand(attention.batch, -1))
    if found is None:
        return None
    mask = _beyond(attention, window, position, found.positions) & found.valid[:, None, None]
    if segment.mask is not None:
        dense = segment.mask.expand(attention.batch, -1, -1, -1)
        mask = mask & dense.gather(3, found.positions[:, None, None].expand(-1, *dense.shape[1:3], -1))
    bias = _bias_at(attention, found.positions)
    return Segment(found.take(segment.key), found.take(segment.value), mask=mask, bias=bias)


def _beyond(attention: Attention, window: Window, position: int, places: Tensor) -> Tensor:
    """Which queries see keys at ``places`` ``(batch or 1, m)`` beyond their window: ``(batch or 1, 1, q_len, m)``.

    Of a causal query these are the keys before its window; those after it are not beyond but hidden.
    """
    query = torch.arange(position, position + attention.q_len, device=places.device)[:, None]
    places = places[:, None, None]
    before = places < query - window.left
    return before if window.right == 0 else before | (places > query + window.right)


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
