"""Functions that read the masks of a dense segment: positions of queries, visible keys, documents of packed rows.

Approximate backends choose keys for each query, for example the first visible keys. In a packed row, the dense mask
hides the documents from each other. So the choice must begin at the first key of the document that contains the query.

These functions read a few rows of a dense mask at a time, to avoid other tensors of the size of the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import BackendRefusedError, Refusal
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Segment

_ENTRIES_AT_ONCE = 1 << 22


class Spans(NamedTuple):
    """The first and the last key that each query sees, and the keys that at least one query sees.

    A query sees a key if the dense mask, the key mask and the pattern all allow the key.
    """

    first: Tensor  # (batch or 1, q_len) int64, the first key that a query sees in any head; kv_len for no key
    last: Tensor  # (batch or 1, q_len) int64, the last key that a query sees in any head; -1 for no key
    visible: Tensor  # (batch or 1, kv_len) bool, the keys that at least one query sees


class DocumentNumbers(NamedTuple):
    """For each sample, the index of the document that contains each key and each query.

    The keys are divided into as many consecutive ranges as possible, such that each query sees keys of one range only.
    These ranges are the documents. A causal mask over the whole row gives one document. A key that no query sees is a
    document of one key.
    """

    keys: Tensor  # (batch or 1, kv_len) int64, ascending
    queries: Tensor  # (batch or 1, q_len) int64, arbitrary for a query that sees no key


@dataclass(frozen=True)
class QueryPlacement:
    """The position of the queries among the keys of an attention with one dense segment."""

    position: int  # the position of query 0 in the key sequence
    aligned: int  # the value of ``position`` if the last query were at the last key
    causal: bool  # whether no query sees a later key
    visible: Tensor | None  # (batch or 1, kv_len) bool, the keys that at least one query sees; None means all keys
    spans: Spans | None  # None without a dense mask

    @property
    def offset(self) -> int | None:
        """The value for the attribute ``offset`` of patterns.

        This is None if the last query is at the last key and ``position`` is not 0. Otherwise it is ``position``.
        """
        return None if self.position == self.aligned != 0 else self.position


def place_queries(backend: str, attention: Attention) -> QueryPlacement:
    """Return the position of the queries among the keys. The first rule that fits decides:

    - The offset of a ``Causal`` pattern, if not None, is the position of query 0.
    - A single query is a decoding step. This query is at the last key that is visible in any sample, because a static
      cache has unused entries after this key.
    - Without a ``Causal`` pattern, a causal dense mask gives the position (:func:`_position_by_mask`).
    - Otherwise, the last query is at the last key.

    Raises:
        BackendRefusedError: only the last rule fits, the pattern is not ``Causal``, the numbers of queries and keys
            differ, and the last key is hidden in all samples. The positions of the queries are then unknown.
    """
    (segment,) = attention.segments
    q_len, kv_len = attention.q_len, segment.kv_len
    aligned = kv_len - q_len
    spans = None if segment.mask is None else read_spans(segment, segment.mask, q_len)
    visible = segment.key_mask if spans is None else spans.visible
    if isinstance(segment.pattern, Causal) and (segment.pattern.offset is not None or q_len > 1):
        offset = segment.pattern.offset
        position, causal = aligned if offset is None else offset, True
    elif q_len == 1:
        position, causal = _last_visible(visible, kv_len) if aligned else 0, True
    else:
        position, causal = (aligned, False) if spans is None else _position_by_mask(spans, q_len, aligned)
        if aligned and not causal and _last_visible(visible, kv_len) < kv_len - 1:
            got = f"a mask that hides the last of {kv_len} keys, so the positions of {q_len} queries are unknown"
            allowed = "one query, a mask that shows the last key, or the pattern Causal(offset=...)"
            raise BackendRefusedError(backend, {"attention": (Refusal("key_mask", got, allowed),)}, {})
    return QueryPlacement(position, aligned, causal, visible, spans)


def _last_visible(visible: Tensor | None, kv_len: int) -> int:
    """Return the index of the last key that is visible in any sample, or ``kv_len - 1`` if no key is visible."""
    if visible is None:
        return kv_len - 1
    count = int((torch.arange(1, kv_len + 1, device=visible.device) * visible.any(0)).max())
    return (count or kv_len) - 1


def _position_by_mask(spans: Spans, q_len: int, aligned: int) -> tuple[int, bool]:
    """Return the position of query 0 that a dense mask implies, and whether the mask is causal.

    With as many keys as queries, the position is 0. Otherwise, this function looks for a position of query 0 with which
    two statements are true. First, no query sees a key after its own position. Second, every query that sees any key
    also sees the key at its own position, unless the masks hide this key from all queries. If no such position exists,
    the mask is not causal, and the last query is at the last key.
    """
    query = torch.arange(q_len, device=spans.last.device)
    if aligned == 0:
        return 0, bool((spans.last <= query).all())
    has_visible_key, reach = spans.last >= 0, spans.last - query
    if not bool(has_visible_key.any()):
        return aligned, False
    position = int(reach.masked_fill(~has_visible_key, -q_len).max())
    self_key, kv_len = query + position, spans.visible.shape[1]
    exists = (self_key >= 0) & (self_key < kv_len)
    is_self_visible = spans.visible[:, self_key.clamp(0, kv_len - 1)] & exists
    causal = bool((reach == position)[has_visible_key & is_self_visible].all())
    return (position, True) if causal else (aligned, False)


def read_spans(segment: Segment, mask: Tensor, q_len: int) -> Spans:
    """Return the :class:`Spans` of a segment whose dense mask is ``mask``."""
    firsts, lasts, visible = [], [], []
    for seen in _visible_rows(segment, mask, q_len):
        rows = seen.any(1) if seen.shape[1] > 1 else seen[:, 0]
        visible.append(rows.any(1))
        rows = rows.view(torch.uint8)
        first = rows.argmax(-1)
        sees_none = rows.gather(2, first[..., None])[..., 0] == 0
        firsts.append(first.masked_fill(sees_none, segment.kv_len))
        lasts.append((segment.kv_len - 1 - rows.flip(-1).argmax(-1)).masked_fill(sees_none, -1))
    return Spans(torch.cat(firsts, dim=1), torch.cat(lasts, dim=1), torch.stack(visible).any(0))


def first_keys(segment: Segment, mask: Tensor, q_len: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the first ``count`` keys that each query sees, and a bool tensor.

    Both tensors are ``(batch or 1, heads or 1, q_len, count)``. If a query sees fewer than ``count`` keys, the bool
    tensor is False for the entries without a key.
    """
    places = torch.arange(segment.kv_len, device=segment.key.device, dtype=torch.int32)
    keys, visible = [], []
    for seen in _visible_rows(segment, mask, q_len):
        # Most queries see consecutive keys. Checking the keys after the first visible key is faster than sorting.
        run = seen.view(torch.uint8).argmax(-1, keepdim=True) + places[:count]
        is_seen = seen.gather(3, run.clamp(max=segment.kv_len - 1)) & (run < segment.kv_len)
        has_gap = ~is_seen.all(-1)
        before_end = torch.where(seen[has_gap], segment.kv_len - places, 0)  # larger for earlier keys, 0 for hidden
        values, run[has_gap] = before_end.topk(count)
        is_seen[has_gap] = values > 0
        keys.append(run)
        visible.append(is_seen)
    return torch.cat(keys, dim=2), torch.cat(visible, dim=2)


def number_documents(attention: Attention, spans: Spans | None) -> DocumentNumbers:
    """Return the document index of each key and query. Without a dense mask, all keys of a sample are one document."""
    (segment,) = attention.segments
    q_len, kv_len = attention.q_len, segment.kv_len
    if spans is None:
        zeros = torch.zeros((1, max(q_len, kv_len)), dtype=torch.long, device=segment.key.device)
        return DocumentNumbers(zeros[:, :kv_len], zeros[:, :q_len])
    # (spans that start at key k or earlier) - (spans that end at key k or earlier) = spans with keys k and k + 1.
    started, ended = (torch.zeros((len(end), kv_len + 1), dtype=torch.long, device=end.device) for end in spans[:2])
    has_visible_key = (spans.last >= 0).long()
    started.scatter_add_(1, spans.first, has_visible_key)
    ended.scatter_add_(1, spans.last.clamp(min=0), has_visible_key)
    open_spans = (started - ended).cumsum(1)[:, : kv_len - 1]
    keys = torch.nn.functional.pad((open_spans == 0).long().cumsum(1), (1, 0))
    return DocumentNumbers(keys, keys.gather(1, spans.first.clamp(max=kv_len - 1)))


def _visible_rows(segment: Segment, mask: Tensor, q_len: int) -> Iterator[Tensor]:
    """Yield ``(batch or 1, heads or 1, n, kv_len)`` bool for the next ``n`` queries: True if a query sees a key."""
    kv_len = segment.kv_len
    samples = len(mask) if segment.key_mask is None else max(len(mask), len(segment.key_mask))
    rows = max(1, _ENTRIES_AT_ONCE // (samples * mask.shape[1] * kv_len))
    index = torch.arange(max(q_len, kv_len), device=mask.device)
    for start in range(0, q_len, rows):
        seen = mask[:, :, start : start + rows]
        if segment.key_mask is not None:
            seen = seen & segment.key_mask[:, None, None]
        if not isinstance(segment.pattern, Full):
            sees = segment.pattern.mask_mod(q_len, kv_len)
            seen = seen & sees(index[:1], index[:1], index[start : start + seen.shape[2], None], index[:kv_len])
        yield seen
