"""An attention as calls of a kernel for packed sequences: padding packed away, windows by arithmetic on spans.

FlashAttention's kernels (Dao 2023, arXiv:2307.08691) take sequences of varying lengths packed one after the other. In
each, the last query is aligned with the last key, and a query sees keys up to ``left`` before and ``right`` after its
place. :func:`plan` says any attention without bias and dense mask in such calls:

- Where places do not matter (``Full``, chunks that are seen whole), padding keys and queries are left out.
- A window or a causal pattern moves with its keys: of each sample the span of real keys is a sequence, with the queries
  that see any of it, and extents shifted by how far the alignment of both ends is off. Samples that are off by the same
  share a call.
- Hidden keys in the middle of such a span keep their places: they are left to the extra dimension of
  :mod:`attnzoo.backends.varlen.packed`.

Every query row in a call sees at least one key of it, hidden or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.common.remember import Memory
from attnzoo.backends.varlen.sorted_calls import sorted_rows
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Segment, SegmentRequest

UNLIMITED = -1
MOST_SEQUENCES = 65535  # per call: kernels count them in a dimension of CUDA's grid that ends there
_plans = Memory()


@dataclass(frozen=True, eq=False)
class Sequences:
    """How packed queries and keys are cut into sequences, and what is seen within each.

    Attributes:
        q_lens: the length of each sequence of queries; none is 0.
        k_lens: the length of its keys.
        device: of the tensors.
        left: keys further than this before a query are not seen; -1: no limit.
        right: the same after it. The last query of a sequence stands at its last key.
    """

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    device: torch.device
    left: int = UNLIMITED
    right: int = UNLIMITED

    @property
    def causal(self) -> bool:
        return (self.left, self.right) == (UNLIMITED, 0)

    @cached_property
    def cumulative(self) -> tuple[Tensor, Tensor, int, int]:
        """As kernels take them: where sequences of queries begin and the last one ends, ``(sequences + 1,)`` int32,
        the same of keys, and the longest of each.
        """
        starts = ([0, *accumulate(lens)] for lens in (self.q_lens, self.k_lens))
        cu_q, cu_k = (torch.tensor(start, dtype=torch.int32, device=self.device) for start in starts)
        return cu_q, cu_k, max(self.q_lens), max(self.k_lens)


class Call(NamedTuple):
    """One call of a kernel.

    Attributes:
        segment: number of the segment the keys are of.
        sequences: how the rows are cut.
        q_rows: ``(sum(q_lens),)`` which rows of the packed queries ``(batch * q_len, ...)``; None: all, in order.
        k_rows: the same of the packed keys ``(batch * kv_len, ...)``. A row past the end is one that is not there.
    """

    segment: int
    sequences: Sequences
    q_rows: Tensor | None = None
    k_rows: Tensor | None = None


class Plan(NamedTuple):
    """The calls an attention consists of; their outputs are united by log-sum-exp.

    Attributes:
        calls: none if no query sees a key.
        hidden: per segment ``(batch, kv_len)`` bool, keys that are in a call and must not be seen; or None.
        spare: whether calls have rows that are not there.
    """

    calls: tuple[Call, ...]
    hidden: tuple[Tensor | None, ...]
    spare: bool


def hides(segment: SegmentRequest) -> bool:
    """Whether a segment may need its keys hidden by an extra dimension."""
    pattern = segment.pattern
    if isinstance(pattern, SortedChunks):
        return True
    return segment.key_mask and not isinstance(pattern, Full) and (not isinstance(pattern, Chunks) or pattern.causal)


def disjoint(segments: tuple[SegmentRequest, ...]) -> bool:
    """Whether each query row is in one call at most, without hidden keys: then there is nothing to unite."""
    return len(segments) == 1 and not hides(segments[0])


def plan(attention: Attention, windows: bool = True) -> Plan:
    """The calls of an attention whose sorted segments, if any, have one head (see :func:`sorted_calls.fold_heads`).

    Remembered for the next layer, which has the same masks, but for sorted segments.

    Args:
        attention: without bias and dense mask.
        windows: whether the kernel takes windows; if not, causal patterns come without.
    """
    segments = attention.segments
    if any(isinstance(segment.pattern, SortedChunks) for segment in segments):
        return _plan(attention, windows)
    masks = [attention.query_mask, *(segment.key_mask for segment in segments)]
    given = tuple(mask is not None for mask in masks)
    lengths = (attention.batch, attention.q_len, *((segment.pattern, segment.kv_len) for segment in segments))
    key = (windows, attention.query.device, lengths, given)
    return _plans.get(key, tuple(mask for mask in masks if mask is not None), lambda: _plan(attention, windows))


def _plan(attention: Attention, windows: bool) -> Plan:
    extents = _extents([attention.query_mask, *(segment.key_mask for segment in attention.segments)])
    q_extents = extents[0] or [(0, attention.q_len, attention.q_len)] * attention.batch
    calls: list[Call] = []
    hidden: list[Tensor | None] = []
    spare = False
    for number, segment in enumerate(attention.segments):
        k_extents = extents[number + 1] or [(0, segment.kv_len, segment.kv_len)] * attention.batch
        pattern, holes = segment.pattern, False
        if isinstance(pattern, SortedChunks):
            calls += (
                Call(number, Sequences(lens, lens, attention.query.device, right=0), q_rows, k_rows)
                for lens, q_rows, k_rows in sorted_rows(attention, segment, pattern)
            )
            spare = True
        elif isinstance(pattern, Chunks):
            calls += _chunks(attention, number, segment, pattern)
            holes = _ordered(pattern, segment.kv_len) and any(count < segment.kv_len for *_, count in k_extents)
        elif isinstance(pattern, Window | Causal):
            calls += _aligned(attention, number, segment, pattern, q_extents, k_extents, windows)
            holes = any(count < stop - start for start, stop, count in k_extents)
        else:
            lens = ([attention.q_len] * attention.batch, [segment.kv_len] * attention.batch)
            calls += _unordered(attention, number, segment, None, None, *lens)
        hidden.append(~segment.key_mask if holes and segment.key_mask is not None else None)
    calls = [_counted(call) if spare else call for call in calls]
    return Plan(tuple(piece for call in calls for piece in _pieces(call)), tuple(hidden), spare)


def _pieces(call: Call) -> list[Call]:
    """A call in as many as its sequences need."""
    whole, count = call.sequences, len(call.sequences.q_lens)
    if count <= MOST_SEQUENCES:
        return [call]
    (q_rows, k_rows), found, q_start, k_start = _numbers(call), [], 0, 0
    for start in range(0, count, MOST_SEQUENCES):
        q_lens, k_lens = (lens[start : start + MOST_SEQUENCES] for lens in (whole.q_lens, whole.k_lens))
        q_stop, k_stop = q_start + sum(q_lens), k_start + sum(k_lens)
        sequences = replace(whole, q_lens=q_lens, k_lens=k_lens)
        found.append(Call(call.segment, sequences, q_rows[q_start:q_stop], k_rows[k_start:k_stop]))
        q_start, k_start = q_stop, k_stop
    return found


def _counted(call: Call) -> Call:
    """The same with all its rows by number, as where there is a spare row, which would be one of all."""
    q_rows, k_rows = _numbers(call)
    return call._replace(q_rows=q_rows, k_rows=k_rows)


def _numbers(call: Call) -> tuple[Tensor, Tensor]:
    """The numbers of its rows of queries and of keys, all of them included."""
    sequences = call.sequences
    q_rows, k_rows = (
        torch.arange(sum(lens), device=sequences.device) if rows is None else rows
        for rows, lens in ((call.q_rows, sequences.q_lens), (call.k_rows, sequences.k_lens))
    )
    return q_rows, k_rows


def _extents(masks: list[Tensor | None]) -> list[list[tuple[int, int, int]] | None]:
    """Per mask and sample: where the first True is, where the last one ends, and how many there are.

    Waits for the device, once.
    """
    found = []
    for mask in masks:
        if mask is not None:
            places = torch.arange(mask.shape[1], device=mask.device)
            first = torch.where(mask, places, mask.shape[1]).amin(1)
            stop = torch.where(mask, places + 1, 0).amax(1)
            found.append(torch.stack([torch.minimum(first, stop), stop, mask.sum(1)], dim=1))
    rows = iter(torch.cat(found).tolist() if found else [])
    return [None if mask is None else [tuple(next(rows)) for _ in mask] for mask in masks]


def _aligned(
    attention: Attention,
    number: int,
    segment: Segment,
    pattern: Window | Causal,
    q_extents: list[tuple[int, int, int]],
    k_extents: list[tuple[int, int, int]],
    windows: bool,
) -> list[Call]:
    """Windows and causal patterns: one sequence per sample, one call per shift."""
    q_len, kv_len, device = attention.q_len, segment.kv_len, attention.query.device
    shift, reach = pattern.shift(q_len, kv_len), q_len + kv_len
    left, right = (pattern.left, pattern.right) if isinstance(pattern, Window) else (reach + abs(shift), 0)
    groups: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for sample, ((q_start, q_stop, _), (k_start, k_stop, _)) in enumerate(zip(q_extents, k_extents, strict=True)):
        # Query i stands at key i + shift and sees left before and right after it. What sees none, or is seen by none,
        # is left out.
        k_stop = min(k_stop, q_stop + shift + right)
        k_start = max(k_start, q_start + shift - left)
        q_stop = min(q_stop, k_stop - shift + left)
        q_start = max(q_start, k_start - shift - right)
        if q_start >= q_stop or k_start >= k_stop:
            continue
        for start, stop in _cut(q_start, q_stop, k_start, k_stop, shift, left, right, windows):
            off = k_stop - stop - shift  # the kernel puts the last query this much after its place
            before, after = _window(left + off, right - off, stop - start, k_stop - k_start)
            spans = groups.setdefault((before, after), [])
            spans.append((sample * q_len + start, stop - start, sample * kv_len + k_start, k_stop - k_start))
    calls = []
    for (before, after), spans in groups.items():
        q_starts, q_lens, k_starts, k_lens = (tuple(column) for column in zip(*spans, strict=True))
        sequences = Sequences(q_lens, k_lens, device, before, after)
        q_rows = None if _is_all(q_starts, q_lens, attention.batch, q_len) else rows_of(q_starts, q_lens, device)
        k_rows = None if _is_all(k_starts, k_lens, attention.batch, kv_len) else rows_of(k_starts, k_lens, device)
        calls.append(Call(number, sequences, q_rows, k_rows))
    return calls


def _window(left: int, right: int, q_count: int, k_count: int) -> tuple[int, int]:
    """The extents of a sequence, without those that leave nothing out."""
    return UNLIMITED if left >= k_count - 1 else left, UNLIMITED if right >= q_count - 1 else right


def _cut(
    q_start: int, q_stop: int, k_start: int, k_stop: int, shift: int, left: int, right: int, windows: bool
) -> list[tuple[int, int]]:
    """The queries of one sample, in as many runs as it takes for kernels to do as they are told.

    They take an extent for none that is as long as the longest sequence of keys, and instead of none beside another one
    they put its length; which is wrong where many queries stand before the first key. Kernels without windows know one
    extent, 0 after a query. So queries that do not see the last key are a run, and those that do not see the first.
    """
    q_count, k_count, off = q_stop - q_start, k_stop - k_start, k_stop - q_stop - shift
    before, after = _window(left + off, right - off, q_count, k_count)
    obeyed = after < k_count and (after != UNLIMITED or before == UNLIMITED or q_count <= k_count + 1)
    if obeyed and (windows or off == 0):
        return [(q_start, q_stop)]
    last = k_stop - shift - right  # from here on queries see the last key
    first = k_start - shift + left + 1  # and from here on they do not see the first
    cuts = [q_start, *(min(max(q_start, cut), q_stop) for cut in (last, max(first, last))), q_stop]
    return [(start, stop) for start, stop in pairwise(cuts) if start < stop]


def _is_all(starts: tuple[int, ...], lens: tuple[int, ...], batch: int, length: int) -> bool:
    """Whether runs of rows are those of all samples, whole and in order."""
    return lens == (length,) * batch and starts == tuple(range(0, batch * length, length))


def _ordered(pattern: Chunks, kv_len: int) -> bool:
    """Whether a causal query sees a part of its own chunk, so that places within the chunk matter."""
    return pattern.causal and pattern.before % -(-kv_len // pattern.length) <= pattern.before + pattern.after


@lru_cache(maxsize=64)
def _neighbourhoods(pattern: Chunks, length: int) -> tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]:
    """Start and length of each chunk of queries that sees any, and start and length of each run of keys it sees."""
    found = []
    for start in range(0, length, pattern.length):
        stop = min(length, start + pattern.length)
        limit = stop if pattern.causal else length
        spans = pattern.spans_near(start, stop, length, limit)
        if spans:
            found.append((start, stop - start, tuple((begin, end - begin) for begin, end in spans)))
    return tuple(found)


def _chunks(attention: Attention, number: int, segment: Segment, pattern: Chunks) -> list[Call]:
    """One sequence per sample and chunk. Keys seen causally end with the chunk's own, where the kernel aligns."""
    length, device = segment.kv_len, attention.query.device
    found = _neighbourhoods(pattern, length)
    if not found:
        return []
    spans = [span for _, _, spans in found for span in spans]
    samples = torch.arange(attention.batch, device=device)[:, None] * length
    starts, counts = zip(*spans, strict=True)
    k_rows = (rows_of(starts, counts, device) + samples).flatten()
    q_lens = [count for _, count, _ in found]
    q_rows = None
    if sum(q_lens) < length:
        q_rows = (rows_of([start for start, _, _ in found], q_lens, device) + samples).flatten()
    k_lens = [sum(count for _, count in spans) for _, _, spans in found]
    lens = (q_lens * attention.batch, k_lens * attention.batch)
    if not _ordered(pattern, length):
        return _unordered(attention, number, segment, q_rows, k_rows, *lens)
    return [Call(number, Sequences(tuple(lens[0]), tuple(lens[1]), device, right=0), q_rows, k_rows)]


def _unordered(
    attention: Attention,
    number: int,
    segment: Segment,
    q_rows: Tensor | None,
    k_rows: Tensor | None,
    q_lens: list[int],
    k_lens: list[int],
) -> list[Call]:
    """Sequences in which every query sees every key, without the rows that masks hide. Waits for the device if any."""
    device = attention.query.device
    if attention.query_mask is not None or segment.key_mask is not None:
        q_kept, q_of = _kept(attention.query_mask, q_rows, q_lens, device)
        k_kept, k_of = _kept(segment.key_mask, k_rows, k_lens, device)
        counts = torch.zeros((2, len(q_lens)), dtype=torch.long, device=device)
        counts[0].index_add_(0, q_of, q_kept.long())
        counts[1].index_add_(0, k_of, k_kept.long())
        counts *= (counts > 0).all(0)  # queries without keys, and keys without queries, are left out
        left = counts.tolist()
        if sum(left[0]) < sum(q_lens):
            q_rows = _pick(q_rows, q_kept & (counts[0] > 0)[q_of])
        if sum(left[1]) < sum(k_lens):
            k_rows = _pick(k_rows, k_kept & (counts[1] > 0)[k_of])
        q_lens, k_lens = ([count for count in side if count] for side in left)
    if not q_lens:
        return []
    return [Call(number, Sequences(tuple(q_lens), tuple(k_lens), device), q_rows, k_rows)]


def _kept(mask: Tensor | None, rows: Tensor | None, lens: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the rows a mask keeps, and the sequence each of them is in."""
    total = sum(lens)
    of = torch.arange(len(lens), device=device).repeat_interleave(torch.tensor(lens, device=device), output_size=total)
    if mask is None:
        return torch.ones(total, dtype=torch.bool, device=device), of
    return (mask.flatten() if rows is None else mask.flatten()[rows]), of


def _pick(rows: Tensor | None, kept: Tensor) -> Tensor:
    return kept.nonzero().flatten() if rows is None else rows[kept]


def rows_of(starts: Iterable[int], lens: Iterable[int], device: torch.device) -> Tensor:
    """The row numbers of runs of rows, one after the other."""
    lens = list(lens)
    ends = list(accumulate(lens))
    begins = [start - end + count for start, end, count in zip(starts, ends, lens, strict=True)]
    begin, count = torch.tensor([begins, lens], device=device)
    return torch.arange(ends[-1], device=device) + begin.repeat_interleave(count, output_size=ends[-1])
