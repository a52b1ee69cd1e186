"""What the pattern and masks of a dense segment show each query: where queries stand, and where documents end.

A packed row holds several documents in one sample, and its dense mask hides each of them from the others. Backends
that rewrite attention count keys per query, from what the mask shows that query; counted from the start of the row,
only the first document would be counted right.

A dense mask is read a few rows at a time, so that nothing else of its size exists.
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
    """What a dense mask shows, together with pattern and key mask.

    Attributes:
        first: ``(batch or 1, q_len)`` long, the first key that a query sees in any head; ``kv_len`` for none.
        last: the same shape, the last key; -1 for none.
        real: ``(batch or 1, kv_len)`` bool, the keys that some query sees.
    """

    first: Tensor
    last: Tensor
    real: Tensor


class Documents(NamedTuple):
    """Which document of its sample each key and each query belongs to, by number.

    A document is a run of keys such that no query sees keys on both sides of either end. One mask for all tokens is
    one document. Keys that no query sees are documents of one key.

    Attributes:
        keys: ``(batch or 1, kv_len)`` long, ascending.
        queries: ``(batch or 1, q_len)`` long; anything for a query that sees no key.
    """

    keys: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Standing:
    """Where the queries of an attention with one dense segment stand.

    Attributes:
        position: key position of query 0.
        causal: no query sees a key behind its own.
        real: ``(batch or 1, kv_len)`` bool, the keys that the masks show to some query; None: all.
        spans: what a dense mask shows each query; None without one.
    """

    position: int
    causal: bool
    real: Tensor | None
    spans: Spans | None


def standing(backend: str, attention: Attention) -> Standing:
    """Where the queries stand.

    A ``Causal`` pattern says it: by its offset, else by aligning the last query with the last key. A single query is a
    decoding step, and stands at the last key that any sample shows: a static cache has room behind it. Of several
    queries on a longer cache a causal dense mask says it; otherwise the last query is aligned with the last key.

    Raises:
        BackendRefusedError: several queries whose masks are not causal, on a longer cache that hides its end in all
            samples: their positions cannot be known.
    """
    (segment,) = attention.segments
    q_len, aligned = attention.q_len, segment.kv_len - attention.q_len
    spans = None if segment.mask is None else read_spans(segment, segment.mask, q_len)
    real = segment.key_mask if spans is None else spans.real
    if isinstance(segment.pattern, Causal) and (segment.pattern.offset is not None or q_len > 1):
        offset = segment.pattern.offset
        return Standing(aligned if offset is None else offset, True, real, spans)
    if q_len == 1:
        return Standing(_last(real) if aligned and _ends_hidden(real) else aligned, True, real, spans)
    position, causal = (aligned, False) if spans is None else _by_mask(spans, q_len, aligned)
    if aligned and not causal and _ends_hidden(real):
        got = f"the end of {segment.kv_len} keys hidden from all {q_len} queries, whose positions it would tell"
        raise BackendRefusedError(backend, {"attention": (Refusal("key_mask", got, "Causal(offset=...)"),)}, {})
    return Standing(position, causal, real, spans)


def aligned_offset(position: int, q_len: int, kv_len: int) -> int | None:
    """The offset of a pattern whose query 0 is at a position; None, which fits all lengths, where that says it."""
    return None if position == kv_len - q_len != 0 else position


def _ends_hidden(real: Tensor | None) -> bool:
    """Whether some keys are shown, and the last one is in no sample. Waits for the device."""
    return real is not None and bool(real.any()) and not bool(real[:, -1].any())


def _last(real: Tensor | None) -> int:
    """The last key that any sample shows; 0 for none."""
    return 0 if real is None else int((torch.arange(real.shape[1], device=real.device) * real.any(0)).max())


def _by_mask(spans: Spans, q_len: int, aligned: int) -> tuple[int, bool]:
    """The position of query 0 by a dense mask, and whether the mask is causal.

    As many keys as queries are the same tokens. On a longer cache a causal mask has one position for query 0 such that
    no query sees a key behind its own, and every query that sees anything sees its own, unless that is hidden from all.
    """
    query = torch.arange(q_len, device=spans.last.device)
    if aligned == 0:
        return 0, bool((spans.last <= query).all())
    live, reach = spans.last >= 0, spans.last - query
    if not bool(live.any()):
        return aligned, False
    position = int(reach.masked_fill(~live, -q_len).max())
    own = query + position
    inside = (own >= 0) & (own < spans.real.shape[1])
    shown = spans.real[:, own.clamp(0, spans.real.shape[1] - 1)] & inside
    causal = bool((reach == position)[live & shown].all())
    return (position, True) if causal else (aligned, False)


def read_spans(segment: Segment, mask: Tensor, q_len: int) -> Spans:
    """What the dense mask of a segment shows each query."""
    firsts, lasts, shown = [], [], []
    for seen in _grids(segment, mask, q_len):
        grid = seen.any(1) if seen.shape[1] > 1 else seen[:, 0]
        shown.append(grid.any(1))
        grid = grid.view(torch.uint8)
        first = grid.argmax(-1)
        none = grid.gather(2, first[..., None])[..., 0] == 0
        firsts.append(first.masked_fill(none, segment.kv_len))
        lasts.append((segment.kv_len - 1 - grid.flip(-1).argmax(-1)).masked_fill(none, -1))
    return Spans(torch.cat(firsts, dim=1), torch.cat(lasts, dim=1), torch.stack(shown).any(0))


def first_keys(segment: Segment, mask: Tensor, q_len: int, count: int) -> tuple[Tensor, Tensor]:
    """The first keys that the dense mask of a segment shows each query; a query may see fewer.

    Returns:
        Keys, long, and whether the query sees them, bool: both ``(batch or 1, heads or 1, q_len, count)``.
    """
    places = torch.arange(segment.kv_len, device=segment.key.device, dtype=torch.int32)
    keys, shown = [], []
    for seen in _grids(segment, mask, q_len):
        # Most queries see a run of keys: a look behind the first one is quicker than sorting.
        run = seen.view(torch.uint8).argmax(-1, keepdim=True) + places[:count]
        there = seen.gather(3, run.clamp(max=segment.kv_len - 1)) & (run < segment.kv_len)
        others = ~there.all(-1)
        before_end = torch.where(seen[others], segment.kv_len - places, 0)  # larger where earlier, 0 where hidden
        values, run[others] = before_end.topk(count)
        there[others] = values > 0
        keys.append(run)
        shown.append(there)
    return torch.cat(keys, dim=2), torch.cat(shown, dim=2)


def documents(attention: Attention, spans: Spans | None) -> Documents:
    """The documents of each sample; without a dense mask there is one."""
    (segment,) = attention.segments
    q_len, kv_len = attention.q_len, segment.kv_len
    if spans is None:
        zeros = torch.zeros((1, max(q_len, kv_len)), dtype=torch.long, device=segment.key.device)
        return Documents(zeros[:, :kv_len], zeros[:, :q_len])
    # Spans that begin at a key or before it, less those that end there or before it: these go on to the next key.
    begun, ended = (torch.zeros((len(end), kv_len + 1), dtype=torch.long, device=end.device) for end in spans[:2])
    live = (spans.last >= 0).long()
    begun.scatter_add_(1, spans.first, live)
    ended.scatter_add_(1, spans.last.clamp(min=0), live)
    open_behind = (begun - ended).cumsum(1)[:, : kv_len - 1]
    keys = torch.nn.functional.pad((open_behind == 0).long().cumsum(1), (1, 0))
    return Documents(keys, keys.gather(1, spans.first.clamp(max=kv_len - 1)))


def _grids(segment: Segment, mask: Tensor, q_len: int) -> Iterator[Tensor]:
    """Who sees whom by dense mask, key mask and pattern, some rows of queries at a time."""
    kv_len = segment.kv_len
    samples = len(mask) if segment.key_mask is None else max(len(mask), len(segment.key_mask))
    rows = max(1, _ENTRIES_AT_ONCE // (samples * mask.shape[1] * kv_len))
    place = torch.arange(max(q_len, kv_len), device=mask.device)
    for start in range(0, q_len, rows):
        seen = mask[:, :, start : start + rows]
        if segment.key_mask is not None:
            seen = seen & segment.key_mask[:, None, None]
        if not isinstance(segment.pattern, Full):
            sees = segment.pattern.mask_mod(q_len, kv_len)
            seen = seen & sees(place[:1], place[:1], place[start : start + seen.shape[2], None], place[:kv_len])
        yield seen
