"""Plan an attention as calls of a kernel for packed sequences, without padding.

The inputs of FlashAttention's kernels (Dao 2023, arXiv:2307.08691) are concatenated sequences of varying lengths. The
last query of a sequence has the position of the last key. A query at position ``p`` sees the keys from ``p - left`` to
``p + right``. :func:`plan_calls` expresses any attention with neither bias nor dense mask in such calls:

- With ``Full``, or if queries see only whole chunks, positions do not matter. The sequences then contain no padding.
- With ``Window`` and ``Causal``, positions matter. A sequence then contains the keys of a sample from the first to the
  last unpadded key, and the queries that see such a key. Padding keys between unpadded keys stay in the sequence, and
  :mod:`attnzoo.backends.varlen.packed` hides them.
- The kernel may place a query at another key than the pattern does. Then this module adds the difference to ``left``
  and ``right``. For example, ``Window(3, 0)`` becomes ``left=2, right=1`` if the kernel places each query one key too
  early, because the last key is padding. Samples with equal ``left`` and ``right`` share a call.

In each call, the pattern lets every query see at least one key. A key mask may hide all these keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.common.tensor_cache import TensorCache
from attnzoo.backends.varlen.sorted_calls import sorted_rows
from attnzoo.spec.patterns import Band, Chunks, Full, SortedChunks, Tile
from attnzoo.spec.segments import Attention, Segment, SegmentRequest

NO_LIMIT = -1  # the value that means no limit for ``left`` and ``right`` in kernels
MAX_SEQUENCES = 65535  # per call: kernels use one CUDA grid dimension of this size for the sequences
_plans = TensorCache()


@dataclass(frozen=True, eq=False)
class Sequences:
    """The lengths of packed sequences, and how many keys a query sees before and after its position."""

    q_lens: tuple[int, ...]  # the number of queries of each sequence, never 0
    k_lens: tuple[int, ...]
    device: torch.device
    left: int = NO_LIMIT  # the number of visible keys before the position of a query
    right: int = NO_LIMIT  # the number of visible keys after the position of a query

    @property
    def causal(self) -> bool:
        return (self.left, self.right) == (NO_LIMIT, 0)

    @cached_property
    def cumulative(self) -> tuple[Tensor, Tensor, int, int]:
        """The boundaries of the query sequences and of the key sequences, and the longest length of each.

        Boundaries are sums of lengths: the lengths 2 and 3 have the boundaries 0, 2, 5.
        """
        starts = ([0, *accumulate(lens)] for lens in (self.q_lens, self.k_lens))
        cu_q, cu_k = (torch.tensor(start, dtype=torch.int32, device=self.device) for start in starts)
        return cu_q, cu_k, max(self.q_lens), max(self.k_lens)


class Call(NamedTuple):
    """One kernel call on rows of the packed queries and rows of the packed keys of one segment."""

    segment: int  # the index of the segment
    sequences: Sequences
    q_rows: Tensor | None = None  # (sum(q_lens),) row indices; batch * q_len is the spare row; None: all rows in order
    k_rows: Tensor | None = None  # (sum(k_lens),) row indices; batch * kv_len is the spare row; None: all rows in order


class CallPlan(NamedTuple):
    """The kernel calls of an attention. The union of the call outputs is the output of the attention."""

    calls: tuple[Call, ...]  # empty if no query sees a key
    hidden: tuple[Tensor | None, ...]  # per segment: (batch, kv_len) bool, True for keys to hide; None: no such key
    has_spare_row: bool  # whether calls use the spare row (see sorted_calls.py)


class _Range(NamedTuple):
    """The range from the first to the last unpadded token of a sample, and the number of unpadded tokens."""

    start: int
    stop: int
    unpadded: int


class _Runs(NamedTuple):
    """A packed tensor of queries or of keys, and which of its rows belong to each sequence."""

    lens: list[int]  # the number of rows of each sequence
    rows: Tensor | None = None  # (sum(lens),) row indices of all sequences; None: all rows in order


def may_hide_keys(segment: SegmentRequest) -> bool:
    """Return whether hidden keys of a segment may stay in a sequence, so that ``packed.py`` must hide them."""
    pattern = segment.pattern
    if isinstance(pattern, SortedChunks):
        return True
    return segment.key_mask and not isinstance(pattern, Full) and (not isinstance(pattern, Chunks) or pattern.causal)


def needs_no_union(segments: tuple[SegmentRequest, ...]) -> bool:
    """Return whether every query is in at most one call and no call contains a hidden key."""
    return len(segments) == 1 and not may_hide_keys(segments[0])


def plan_calls(attention: Attention, has_windows: bool = True) -> CallPlan:
    """Return the calls of an attention. Layers with equal masks share a cached plan, except with ``SortedChunks``.

    The attention must have no bias and no dense mask. With ``SortedChunks``, the attention must have one head
    (:func:`attnzoo.backends.varlen.sorted_calls.fold_heads`). ``has_windows``: whether the kernel supports windows.
    """
    segments = attention.segments
    if any(isinstance(segment.pattern, SortedChunks) for segment in segments):
        return _plan(attention, has_windows)
    masks = [attention.query_mask, *(segment.key_mask for segment in segments)]
    given = tuple(mask is not None for mask in masks)
    lengths = (attention.batch, attention.q_len, *((segment.pattern, segment.kv_len) for segment in segments))
    key = (has_windows, attention.query.device, lengths, given)
    return _plans.get(key, tuple(mask for mask in masks if mask is not None), lambda: _plan(attention, has_windows))


def _plan(attention: Attention, has_windows: bool) -> CallPlan:
    batch, q_len = attention.batch, attention.q_len
    q_ranges, *k_ranges = _ranges([attention.query_mask, *(segment.key_mask for segment in attention.segments)])
    q_ranges = q_ranges or [_Range(0, q_len, q_len)] * batch
    calls: list[Call] = []
    hidden: list[Tensor | None] = []
    has_spare_row = False
    for number, segment in enumerate(attention.segments):
        kv_len, pattern, has_holes = segment.kv_len, segment.pattern, False
        ranges = k_ranges[number] or [_Range(0, kv_len, kv_len)] * batch
        if isinstance(pattern, SortedChunks):
            calls += (
                Call(number, Sequences(lens, lens, attention.query.device, right=0), q_rows, k_rows)
                for lens, q_rows, k_rows in sorted_rows(attention, segment, pattern)
            )
            has_spare_row = True
        elif isinstance(pattern, Chunks):
            calls += _chunk_calls(attention, number, segment, pattern)
            has_holes = _is_ordered(pattern, kv_len) and any(keys.unpadded < kv_len for keys in ranges)
        elif isinstance(pattern, Full):
            calls += _unordered_calls(attention, number, _Runs([q_len] * batch), _Runs([kv_len] * batch))
        else:
            band = pattern.band(q_len, kv_len)
            if band is None:
                raise NotImplementedError(
                    f"got {pattern}, which is no band of keys; allowed: a pattern in the capabilities"
                )
            calls += _band_calls(attention, number, band, zip(q_ranges, ranges, strict=True), has_windows)
            has_holes = any(keys.unpadded < keys.stop - keys.start for keys in ranges)
        hidden.append(~segment.key_mask if has_holes and segment.key_mask is not None else None)
    if has_spare_row:  # "all rows" would include the spare row
        calls = [call._replace(q_rows=rows[0], k_rows=rows[1]) for call in calls for rows in [_row_numbers(call)]]
    return CallPlan(tuple(piece for call in calls for piece in _split(call)), tuple(hidden), has_spare_row)


def _split(call: Call) -> list[Call]:
    """Return the call or, if it has more than ``MAX_SEQUENCES`` sequences, several calls with at most this number."""
    whole, count = call.sequences, len(call.sequences.q_lens)
    if count <= MAX_SEQUENCES:
        return [call]
    (q_rows, k_rows), pieces, q_start, k_start = _row_numbers(call), [], 0, 0
    for start in range(0, count, MAX_SEQUENCES):
        q_lens, k_lens = (lens[start : start + MAX_SEQUENCES] for lens in (whole.q_lens, whole.k_lens))
        q_stop, k_stop = q_start + sum(q_lens), k_start + sum(k_lens)
        sequences = replace(whole, q_lens=q_lens, k_lens=k_lens)
        pieces.append(Call(call.segment, sequences, q_rows[q_start:q_stop], k_rows[k_start:k_stop]))
        q_start, k_start = q_stop, k_stop
    return pieces


def _row_numbers(call: Call) -> tuple[Tensor, Tensor]:
    """Return the indices of the query rows and of the key rows of a call, also if the call has None (all rows)."""
    sequences = call.sequences
    q_rows, k_rows = (
        torch.arange(sum(lens), device=sequences.device) if rows is None else rows
        for rows, lens in ((call.q_rows, sequences.q_lens), (call.k_rows, sequences.k_lens))
    )
    return q_rows, k_rows


def _ranges(masks: list[Tensor | None]) -> list[list[_Range] | None]:
    """Return for each mask the range of each sample, or None if the mask is None. This waits for the device once."""
    stacked = []
    for mask in masks:
        if mask is not None:
            positions = torch.arange(mask.shape[1], device=mask.device)
            first = torch.where(mask, positions, mask.shape[1]).amin(1)
            stop = torch.where(mask, positions + 1, 0).amax(1)
            stacked.append(torch.stack([torch.minimum(first, stop), stop, mask.sum(1)], dim=1))
    rows = iter(torch.cat(stacked).tolist() if stacked else [])
    return [None if mask is None else [_Range(*next(rows)) for _ in mask] for mask in masks]


def _band_calls(
    attention: Attention, number: int, band: Band, ranges: Iterable[tuple[_Range, _Range]], has_windows: bool
) -> list[Call]:
    """Return the calls of a window or causal pattern. Sequences with equal ``left`` and ``right`` share a call."""
    q_len, kv_len, device = attention.q_len, attention.segments[number].kv_len, attention.query.device
    groups: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for sample, (queries, keys) in enumerate(ranges):
        # Remove keys that no query sees, then queries that see no key.
        k_stop = min(keys.stop, queries.stop + band.highest)
        k_start = max(keys.start, queries.start + band.lowest)
        q_stop = min(queries.stop, k_stop - band.lowest)
        q_start = max(queries.start, k_start - band.highest)
        if q_start >= q_stop or k_start >= k_stop:
            continue
        for tile in _cut(Tile(q_start, q_stop, k_start, k_stop, q_len, kv_len), band, has_windows):
            q_count, k_count = tile.q_stop - tile.q_start, k_stop - k_start
            spans = groups.setdefault(_extents(tile, band), [])
            spans.append((sample * q_len + tile.q_start, q_count, sample * kv_len + k_start, k_count))
    calls = []
    for extents, spans in groups.items():
        q_starts, q_lens, k_starts, k_lens = (tuple(column) for column in zip(*spans, strict=True))
        q_rows = None if _is_all(q_starts, q_lens, attention.batch, q_len) else rows_of(q_starts, q_lens, device)
        k_rows = None if _is_all(k_starts, k_lens, attention.batch, kv_len) else rows_of(k_starts, k_lens, device)
        calls.append(Call(number, Sequences(q_lens, k_lens, device, *extents), q_rows, k_rows))
    return calls


def _extents(tile: Tile, band: Band) -> tuple[int, int]:
    """Return ``left`` and ``right`` for the queries and keys of a tile, or ``NO_LIMIT`` for values that hide no key."""
    aligned = tile.kv_stop - tile.q_stop  # the distance from a query to the key at its position in the kernel
    left, right = aligned - band.lowest, band.highest - aligned
    q_count, k_count = tile.q_stop - tile.q_start, tile.kv_stop - tile.kv_start
    return NO_LIMIT if left >= k_count - 1 else left, NO_LIMIT if right >= q_count - 1 else right


def _cut(tile: Tile, band: Band, has_windows: bool) -> list[Tile]:
    """Return the tile, or up to three tiles with fewer queries if one kernel call would use a wrong window.

    The first cut is after the first query that sees the last key. The second cut is before the first later query that
    does not see the first key. There are two reasons to cut. First, FlashAttention reads a ``left`` or ``right`` of at
    least the longest key length as ``NO_LIMIT``. If only ``left`` or only ``right`` is then ``NO_LIMIT``,
    FlashAttention uses the longest key length for it. This is too small if many queries are before the first key.
    Second, kernels without windows support only ``right=0``.
    """
    q_start, q_stop, k_start, k_stop, *_ = tile
    q_count, k_count = q_stop - q_start, k_stop - k_start
    left, right = _extents(tile, band)
    is_exact = right < k_count and (right != NO_LIMIT or left == NO_LIMIT or q_count <= k_count + 1)
    if is_exact and (has_windows or k_stop - q_stop == band.highest):
        return [tile]
    sees_last = k_stop - band.highest  # the query after the first query that sees the last key
    misses_first = k_start - band.lowest + 1  # from this query on, queries do not see the first key
    inner = (min(max(q_start, cut), q_stop) for cut in (sees_last, max(misses_first, sees_last)))
    return [
        tile._replace(q_start=start, q_stop=stop) for start, stop in pairwise([q_start, *inner, q_stop]) if start < stop
    ]


def _is_all(starts: tuple[int, ...], lens: tuple[int, ...], batch: int, length: int) -> bool:
    """Whether the runs of rows, given by their starts and lengths, are all rows of all samples in order."""
    return lens == (length,) * batch and starts == tuple(range(0, batch * length, length))


def _is_ordered(pattern: Chunks, kv_len: int) -> bool:
    """Whether a query sees its own chunk, but only up to its position. Positions within the chunk then matter."""
    return pattern.causal and pattern.before % -(-kv_len // pattern.length) <= pattern.before + pattern.after


@lru_cache(maxsize=64)
def _neighbourhoods(pattern: Chunks, length: int) -> tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]:
    """Return ``(start, length, key ranges)`` for each chunk of queries that sees a key, for a sequence of ``length``.

    A key range is ``(start, length)``. For example, 6 tokens in chunks of 2 with ``before=1``: the first chunk is
    ``(0, 2, ((0, 2), (4, 2)))``, because it sees itself and the last chunk.
    """
    chunks = []
    for start in range(0, length, pattern.length):
        stop = min(length, start + pattern.length)
        spans = pattern.spans_near(start, stop, length, limit=stop if pattern.causal else length)
        if spans:
            chunks.append((start, stop - start, tuple((begin, end - begin) for begin, end in spans)))
    return tuple(chunks)


def _chunk_calls(attention: Attention, number: int, segment: Segment, pattern: Chunks) -> list[Call]:
    """Return at most one call. Its sequences are the chunks of queries, each with the keys that this chunk sees."""
    length, device = segment.kv_len, attention.query.device
    chunks = _neighbourhoods(pattern, length)
    if not chunks:
        return []
    samples = torch.arange(attention.batch, device=device)[:, None] * length
    starts, counts = zip(*(span for _, _, spans in chunks for span in spans), strict=True)
    k_rows = (rows_of(starts, counts, device) + samples).flatten()
    q_lens = [count for _, count, _ in chunks]
    q_rows = None
    if sum(q_lens) < length:
        q_rows = (rows_of([start for start, _, _ in chunks], q_lens, device) + samples).flatten()
    k_lens = [sum(count for _, count in spans) for _, _, spans in chunks]
    queries, keys = _Runs(q_lens * attention.batch, q_rows), _Runs(k_lens * attention.batch, k_rows)
    if not _is_ordered(pattern, length):
        return _unordered_calls(attention, number, queries, keys)
    return [Call(number, Sequences(tuple(queries.lens), tuple(keys.lens), device, right=0), q_rows, k_rows)]


def _unordered_calls(attention: Attention, number: int, queries: _Runs, keys: _Runs) -> list[Call]:
    """Return at most one call, in which a query sees all keys of its sequence. With a mask, this waits for the device.

    ``queries`` and ``keys`` are the sequences before padding is removed.
    """
    device, key_mask = attention.query.device, attention.segments[number].key_mask
    if attention.query_mask is not None or key_mask is not None:
        q_kept, q_of = _kept(attention.query_mask, queries, device)
        k_kept, k_of = _kept(key_mask, keys, device)
        counts = torch.zeros((2, len(queries.lens)), dtype=torch.long, device=device)
        counts[0].index_add_(0, q_of, q_kept.long())
        counts[1].index_add_(0, k_of, k_kept.long())
        counts *= (counts > 0).all(0)  # drop sequences without queries or without keys
        q_lens, k_lens = counts.tolist()
        queries = _pick(queries, q_kept & (counts[0] > 0)[q_of], q_lens)
        keys = _pick(keys, k_kept & (counts[1] > 0)[k_of], k_lens)
    if not queries.lens:
        return []
    return [Call(number, Sequences(tuple(queries.lens), tuple(keys.lens), device), queries.rows, keys.rows)]


def _kept(mask: Tensor | None, runs: _Runs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each row of ``runs``: whether the row is real (no padding), and the index of its sequence."""
    total, lens = sum(runs.lens), torch.tensor(runs.lens, device=device)
    sequence = torch.arange(len(lens), device=device).repeat_interleave(lens, output_size=total)
    if mask is None:
        return torch.ones(total, dtype=torch.bool, device=device), sequence
    return (mask.flatten() if runs.rows is None else mask.flatten()[runs.rows]), sequence


def _pick(runs: _Runs, kept: Tensor, lens: list[int]) -> _Runs:
    """Return ``runs`` with only the rows where ``kept`` is True, and without sequences that have no such row.

    ``lens`` are the numbers of kept rows of all sequences of ``runs``.
    """
    index = runs.rows
    if sum(lens) < sum(runs.lens):
        index = kept.nonzero().flatten() if index is None else index[kept]
    return _Runs([count for count in lens if count], index)


def rows_of(starts: Iterable[int], lens: Iterable[int], device: torch.device) -> Tensor:
    """Return the row indices of runs of consecutive rows: starts 0 and 7, lengths 2 and 3 give 0, 1, 7, 8, 9."""
    lens = list(lens)
    ends = list(accumulate(lens))
    begins = [start - end + count for start, end, count in zip(starts, ends, lens, strict=True)]
    begin, count = torch.tensor([begins, lens], device=device)
    return torch.arange(ends[-1], device=device) + begin.repeat_interleave(count, output_size=ends[-1])
