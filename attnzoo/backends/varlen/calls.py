"""Plan an attention as calls of a kernel for packed sequences: padding is left out, windows are shifted arithmetic.

FlashAttention's kernels (Dao 2023, arXiv:2307.08691) take sequences of varying lengths, packed one after the other. In
each sequence the last query is aligned with the last key, and a query sees the keys from ``left`` before to ``right``
after its position. :func:`plan_calls` expresses any attention without bias and dense mask in such calls:

- If positions do not matter (``Full``, chunks that are seen whole), padding keys and queries are left out.
- In a band (windows, causal) positions matter: the sequence of a sample is its range of unpadded keys with the queries
  that see any of them, and the window extents are shifted by how far this alignment differs from the pattern's. Samples
  with the same extents share a call.
- Hidden keys inside such a range keep their positions; :mod:`attnzoo.backends.varlen.packed` hides them by an extra
  dimension.

Every query row of a call sees at least one key of the call, hidden or not.
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

NO_LIMIT = -1  # how kernels spell a window extent without a limit
MAX_SEQUENCES = 65535  # per call: the size of the dimension of CUDA's grid in which kernels count sequences
_plans = TensorCache()


@dataclass(frozen=True, eq=False)
class Sequences:
    """How packed queries and keys are cut into sequences, and what is visible within each.

    The last query of a sequence is at its last key.
    """

    q_lens: tuple[int, ...]  # the number of queries of each sequence, never 0
    k_lens: tuple[int, ...]
    device: torch.device
    left: int = NO_LIMIT  # how many keys before its position a query sees
    right: int = NO_LIMIT  # how many keys after its position a query sees

    @property
    def causal(self) -> bool:
        return (self.left, self.right) == (NO_LIMIT, 0)

    @cached_property
    def cumulative(self) -> tuple[Tensor, Tensor, int, int]:
        """Starts of the sequences and the end of the last, of queries and of keys; the longest sequence of each."""
        starts = ([0, *accumulate(lens)] for lens in (self.q_lens, self.k_lens))
        cu_q, cu_k = (torch.tensor(start, dtype=torch.int32, device=self.device) for start in starts)
        return cu_q, cu_k, max(self.q_lens), max(self.k_lens)


class Call(NamedTuple):
    """One call of a kernel, on rows of the packed queries and of the packed keys of a segment."""

    segment: int  # its number
    sequences: Sequences
    q_rows: Tensor | None = None  # (sum(q_lens),) rows of (batch * q_len, ...); None: all, in order
    k_rows: Tensor | None = None  # (sum(k_lens),) rows of (batch * kv_len, ...); the row past the end is the spare row


class CallPlan(NamedTuple):
    """The calls of an attention; their outputs are merged by log-sum-exp."""

    calls: tuple[Call, ...]  # empty if no query sees a key
    hidden: tuple[Tensor | None, ...]  # per segment (batch, kv_len) bool: keys of a call that must not be seen
    has_spare_row: bool  # whether calls use the spare row, a query and a key that do not exist


class _Range(NamedTuple):
    """The tokens of one sample from the first unpadded token to the last, and how many of them are unpadded."""

    start: int
    stop: int
    unpadded: int


class _Runs(NamedTuple):
    """Runs of packed rows that make sequences: the length of each run, and which rows; None: all, in order."""

    lens: list[int]
    rows: Tensor | None = None


def may_hide_keys(segment: SegmentRequest) -> bool:
    """Return whether a segment may need the extra dimension that hides keys."""
    pattern = segment.pattern
    if isinstance(pattern, SortedChunks):
        return True
    return segment.key_mask and not isinstance(pattern, Full) and (not isinstance(pattern, Chunks) or pattern.causal)


def needs_no_union(segments: tuple[SegmentRequest, ...]) -> bool:
    """Return whether each query row is in one call at most and no key is hidden."""
    return len(segments) == 1 and not may_hide_keys(segments[0])


def plan_calls(attention: Attention, has_windows: bool = True) -> CallPlan:
    """Return the calls of an attention, cached for the layers that share its masks if no segment is sorted.

    The attention has no bias and no dense mask, and only one head if segments are sorted (see
    :func:`attnzoo.backends.varlen.sorted_calls.fold_heads`). A kernel without windows gets none for causal patterns.
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
                raise NotImplementedError(f"{pattern} is neither chunks nor a band: the backend should have refused it")
            calls += _band_calls(attention, number, band, zip(q_ranges, ranges, strict=True), has_windows)
            has_holes = any(keys.unpadded < keys.stop - keys.start for keys in ranges)
        hidden.append(~segment.key_mask if has_holes and segment.key_mask is not None else None)
    if has_spare_row:  # "all rows" would include the spare row
        calls = [call._replace(q_rows=rows[0], k_rows=rows[1]) for call in calls for rows in [_row_numbers(call)]]
    return CallPlan(tuple(piece for call in calls for piece in _split(call)), tuple(hidden), has_spare_row)


def _split(call: Call) -> list[Call]:
    """Split a call with more than ``MAX_SEQUENCES`` sequences."""
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
    """The row numbers of a call's queries and keys, in place of None."""
    sequences = call.sequences
    q_rows, k_rows = (
        torch.arange(sum(lens), device=sequences.device) if rows is None else rows
        for rows, lens in ((call.q_rows, sequences.q_lens), (call.k_rows, sequences.k_lens))
    )
    return q_rows, k_rows


def _ranges(masks: list[Tensor | None]) -> list[list[_Range] | None]:
    """The range of each sample under each mask. Waits for the device, once."""
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
    """Windows and causal patterns: one sequence per sample, one call per pair of window extents."""
    q_len, kv_len, device = attention.q_len, attention.segments[number].kv_len, attention.query.device
    groups: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for sample, (queries, keys) in enumerate(ranges):
        # Leave out keys that no query sees, and then queries that see no key.
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
    """The window extents of a tile as one sequence; ``NO_LIMIT`` where an extent would hide nothing."""
    aligned = tile.kv_stop - tile.q_stop  # the distance from a query to its position in the kernel
    left, right = aligned - band.lowest, band.highest - aligned
    q_count, k_count = tile.q_stop - tile.q_start, tile.kv_stop - tile.kv_start
    return NO_LIMIT if left >= k_count - 1 else left, NO_LIMIT if right >= q_count - 1 else right


def _cut(tile: Tile, band: Band, has_windows: bool) -> list[Tile]:
    """Cut a sample by queries if kernels would compute other extents than asked for.

    FlashAttention treats an extent >= the longest sequence of keys as no limit. If only one extent has no limit, it
    takes that length for it, which is wrong if many queries come before the first key. Kernels without windows have
    one extent only: 0 keys after a query. So queries that do not see the last key, and queries that do not see the
    first key, become separate tiles.
    """
    q_start, q_stop, k_start, k_stop, *_ = tile
    q_count, k_count = q_stop - q_start, k_stop - k_start
    left, right = _extents(tile, band)
    is_exact = right < k_count and (right != NO_LIMIT or left == NO_LIMIT or q_count <= k_count + 1)
    if is_exact and (has_windows or k_stop - q_stop == band.highest):
        return [tile]
    sees_last = k_stop - band.highest  # from this query on, queries see the last key
    misses_first = k_start - band.lowest + 1  # from this query on, queries do not see the first key
    inner = (min(max(q_start, cut), q_stop) for cut in (sees_last, max(misses_first, sees_last)))
    return [
        tile._replace(q_start=start, q_stop=stop) for start, stop in pairwise([q_start, *inner, q_stop]) if start < stop
    ]


def _is_all(starts: tuple[int, ...], lens: tuple[int, ...], batch: int, length: int) -> bool:
    """Whether the runs are all samples, whole and in order."""
    return lens == (length,) * batch and starts == tuple(range(0, batch * length, length))


def _is_ordered(pattern: Chunks, kv_len: int) -> bool:
    """Whether a causal query sees its own chunk in part, so that positions within the chunk matter."""
    return pattern.causal and pattern.before % -(-kv_len // pattern.length) <= pattern.before + pattern.after


@lru_cache(maxsize=64)
def _neighbourhoods(pattern: Chunks, length: int) -> tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]:
    """Start and length of each chunk of queries that sees keys, and start and length of each run of these keys."""
    chunks = []
    for start in range(0, length, pattern.length):
        stop = min(length, start + pattern.length)
        spans = pattern.spans_near(start, stop, length, limit=stop if pattern.causal else length)
        if spans:
            chunks.append((start, stop - start, tuple((begin, end - begin) for begin, end in spans)))
    return tuple(chunks)


def _chunk_calls(attention: Attention, number: int, segment: Segment, pattern: Chunks) -> list[Call]:
    """One sequence per sample and chunk. Causal keys end with the chunk itself, where the kernel aligns."""
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
    """Sequences in which every query sees every key, without masked rows. Waits for the device if there is a mask."""
    device, key_mask = attention.query.device, attention.segments[number].key_mask
    if attention.query_mask is not None or key_mask is not None:
        q_kept, q_of = _kept(attention.query_mask, queries, device)
        k_kept, k_of = _kept(key_mask, keys, device)
        counts = torch.zeros((2, len(queries.lens)), dtype=torch.long, device=device)
        counts[0].index_add_(0, q_of, q_kept.long())
        counts[1].index_add_(0, k_of, k_kept.long())
        counts *= (counts > 0).all(0)  # leave out queries without keys, and keys without queries
        q_lens, k_lens = counts.tolist()
        queries = _pick(queries, q_kept & (counts[0] > 0)[q_of], q_lens)
        keys = _pick(keys, k_kept & (counts[1] > 0)[k_of], k_lens)
    if not queries.lens:
        return []
    return [Call(number, Sequences(tuple(queries.lens), tuple(keys.lens), device), queries.rows, keys.rows)]


def _kept(mask: Tensor | None, runs: _Runs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the rows a mask keeps, and the sequence of each row."""
    total, lens = sum(runs.lens), torch.tensor(runs.lens, device=device)
    sequence = torch.arange(len(lens), device=device).repeat_interleave(lens, output_size=total)
    if mask is None:
        return torch.ones(total, dtype=torch.bool, device=device), sequence
    return (mask.flatten() if runs.rows is None else mask.flatten()[runs.rows]), sequence


def _pick(runs: _Runs, kept: Tensor, lens: list[int]) -> _Runs:
    """The kept rows, whose sequences have the lengths ``lens``; sequences without rows are dropped."""
    index = runs.rows
    if sum(lens) < sum(runs.lens):
        index = kept.nonzero().flatten() if index is None else index[kept]
    return _Runs([count for count in lens if count], index)


def rows_of(starts: Iterable[int], lens: Iterable[int], device: torch.device) -> Tensor:
    """Return the row numbers of runs of rows, one run after the other."""
    lens = list(lens)
    ends = list(accumulate(lens))
    begins = [start - end + count for start, end, count in zip(starts, ends, lens, strict=True)]
    begin, count = torch.tensor([begins, lens], device=device)
    return torch.arange(ends[-1], device=device) + begin.repeat_interleave(count, output_size=ends[-1])
