"""Attention of packed rows. A packed row contains several documents, and attention is causal within each document.

Models describe packed rows by a dense mask. This module finds the documents in the mask and computes the attention of
each document as a separate sample. Every backend that supports causal attention and padding keys then supports packed
rows, and no kernel computes scores between two documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnzoo.spec.bias import Bias, RelativeBias
from attnzoo.spec.patterns import Causal
from attnzoo.spec.segments import Attention, Result

if TYPE_CHECKING:
    from attnzoo.adapter import Attend

_ENTRIES_AT_ONCE = 1 << 24
_SHORT = 6  # documents of up to 2**6 tokens share a pack, because another kernel call costs more than padding


@dataclass(frozen=True, eq=False)
class Pack:
    """Documents of similar length that form one batch, with one document per sample.

    Attributes:
        index: ``(documents, longest)`` int64, the tokens of each document as indices into the ``batch * length`` tokens
            of the packed rows. The indices of padding are arbitrary.
        real: ``(documents, longest)`` bool, False for padding. None means that there is no padding.
    """

    index: Tensor
    real: Tensor | None

    def attention(self, packed: Attention) -> Attention:
        """Return the attention of these documents as a batch. ``packed`` is the attention of the packed rows."""
        (segment,) = packed.segments
        key, value = self._gather(segment.key), self._gather(segment.value)
        segment = replace(segment, key=key, value=value, pattern=Causal(offset=0), key_mask=self.real, mask=None)
        return replace(packed, query=self._gather(packed.query), segments=(segment,), query_mask=self.real)

    def real_rows(self, output: Tensor) -> Tensor:
        """Remove padding: return ``(n, heads, dim)`` from an output ``(documents, heads, longest, dim)``."""
        output = output.transpose(1, 2)
        return output.flatten(0, 1) if self.real is None else output[self.real]

    @property
    def real_index(self) -> Tensor:
        """The entries ``(n,)`` of ``index`` that are not padding, in the order of :meth:`real_rows`."""
        return self.index.flatten() if self.real is None else self.index[self.real]

    def _gather(self, tensor: Tensor) -> Tensor:
        """Return the tokens of the documents as ``(documents, heads, longest, dim)``."""
        # ``tokens`` is a view in most models, because projections have the memory layout (batch, length, heads, dim).
        tokens = tensor.transpose(1, 2).flatten(0, 1)
        return tokens.index_select(0, self.index.flatten()).unflatten(0, tuple(self.index.shape)).transpose(1, 2)


def find_documents(visible: Tensor, batch: int) -> tuple[Pack, ...] | None:
    """Return the documents of packed rows, or None if the mask is not the mask of packed rows.

    ``visible`` is ``(batch or 1, length, length)`` bool, True if the query (dimension 1) sees the key (dimension 2). A
    query that sees no key belongs to no document.
    """
    samples, q_len, kv_len = visible.shape
    if q_len != kv_len:
        return None
    key = torch.arange(kv_len, device=visible.device)
    parts: list[Tensor] = []
    for rows in visible.split(max(1, _ENTRIES_AT_ONCE // (samples * kv_len)), dim=1):
        first = torch.where(rows.any(-1), rows.byte().argmax(-1), kv_len)
        query = key[sum(part.shape[1] for part in parts) :][: rows.shape[1]]
        if not torch.equal((key >= first[..., None]) & (key <= query[:, None]), rows):
            return None
        parts.append(first)
    first = torch.cat(parts, dim=1)  # the first key that each query sees; kv_len for a query that sees no key
    previous = torch.nn.functional.pad(first, (1, 0), value=-1)[:, :-1]
    if not bool(((first == key) | (first == previous) | (first == kv_len)).all()):
        return None
    first = first.expand(batch, -1)
    offset = torch.arange(batch, device=key.device)[:, None] * kv_len
    start, length = (first + offset)[first < kv_len].unique(return_counts=True)
    return _packs(dict(torch.stack([start, length], dim=1).tolist()), key.device) or None


def _packs(lengths: dict[int, int], device: torch.device) -> tuple[Pack, ...]:
    """Group documents of similar length. ``lengths`` is ``{index of the first token: length}``.

    Padding at most doubles the length of a document of more than 64 tokens.
    """
    groups: dict[int, list[int]] = {}
    for start, length in lengths.items():
        groups.setdefault(max(_SHORT, (length - 1).bit_length()), []).append(start)
    packs = []
    for starts in groups.values():
        counts = [lengths[start] for start in starts]
        start, count = torch.tensor([starts, counts], device=device)[..., None]
        step = torch.arange(max(counts), device=device)
        real = step < count
        packs.append(Pack(torch.where(real, start + step, start), None if min(counts) == max(counts) else real))
    return tuple(packs)


def attend_documents(
    attend: Attend, attention: Attention, documents: tuple[Pack, ...] | None, probabilities: bool = False
) -> Result:
    """Compute an attention with one segment. Compute each document separately if possible.

    Otherwise compute the whole rows with the dense mask. There are five reasons for this: ``documents`` is None; the
    backend refuses the attention of a document; probabilities are requested; the attention has a query mask, key mask
    or ``empty``; the bias depends on more than the distance.
    """
    (segment,) = attention.segments
    extras = (attention.query_mask, attention.empty, segment.key_mask)
    if documents is None or probabilities or not _by_distance(segment.bias) or any(x is not None for x in extras):
        return attend(attention, probabilities)
    parts = [pack.attention(attention) for pack in documents]
    if not all(map(attend.takes, parts)):
        return attend(attention)
    results = [attend(part) for part in parts]
    rows = torch.cat([pack.real_rows(result.output) for pack, result in zip(documents, results, strict=True)])
    output = rows.new_zeros((attention.batch * attention.q_len, *rows.shape[1:]))
    output = output.index_copy(0, torch.cat([pack.real_index for pack in documents]), rows)
    kernel = "+".join(dict.fromkeys(result.kernel for result in results))
    return Result(output.unflatten(0, (attention.batch, -1)).transpose(1, 2), kernel)


def _by_distance(bias: Bias | None) -> bool:
    """Whether the bias within a document is the same wherever the document is in the row."""
    return bias is None or (type(bias) is RelativeBias and bias.positions is None and not bias.offset)
