"""Packed rows: several documents one after the other in one row, each of which sees its own tokens alone, causally.

Models write packed rows out as a dense mask. Here that mask is read back into documents, and the attention is computed
with each document as a separate sample. Every backend that takes causal attention with padding keys then takes packed
rows, and no query pays for the keys of another document.
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
_SHORT = 6  # documents of up to 2**6 tokens go together: a call of a kernel costs more than their padding


@dataclass(frozen=True, eq=False)
class Pack:
    """Documents of similar length, side by side as samples.

    Attributes:
        rows: ``(documents, longest)`` long: which of the ``batch * length`` tokens stands where; anything in padding.
        real: ``(documents, longest)`` bool, False for padding; None: there is none.
    """

    rows: Tensor
    real: Tensor | None

    def of(self, attention: Attention) -> Attention:
        """The attention of these documents, by that of the packed rows."""
        (segment,) = attention.segments
        key, value = self._pick(segment.key), self._pick(segment.value)
        inside = replace(segment, key=key, value=value, pattern=Causal(offset=0), key_mask=self.real, mask=None)
        return replace(attention, query=self._pick(attention.query), segments=(inside,), query_mask=self.real)

    def tokens(self, output: Tensor) -> Tensor:
        """The real tokens ``(n, heads, dim)`` of ``(documents, heads, longest, dim)``, in order of :attr:`places`."""
        output = output.transpose(1, 2)
        return output.flatten(0, 1) if self.real is None else output[self.real]

    @property
    def places(self) -> Tensor:
        """Which of the ``batch * length`` tokens the real ones are."""
        return self.rows.flatten() if self.real is None else self.rows[self.real]

    def _pick(self, tensor: Tensor) -> Tensor:
        """``(documents, heads, longest, dim)`` of ``(batch, heads, length, dim)``."""
        # Mostly a view: projections lie in memory as (batch, length, heads, dim).
        tokens = tensor.transpose(1, 2).flatten(0, 1)
        return tokens.index_select(0, self.rows.flatten()).unflatten(0, tuple(self.rows.shape)).transpose(1, 2)


def find_documents(visible: Tensor, batch: int) -> tuple[Pack, ...] | None:
    """The documents of packed rows, each of which sees itself causally; None if a mask shows anything else.

    Args:
        visible: ``(batch or 1, length, length)`` bool, True where the query (rows) sees the key (columns). Queries that
            see nothing are in no document.
        batch: number of samples.
    """
    samples, q_len, kv_len = visible.shape
    if q_len != kv_len:
        return None
    key = torch.arange(kv_len, device=visible.device)
    firsts: list[Tensor] = []
    for rows in visible.split(max(1, _ENTRIES_AT_ONCE // (samples * kv_len)), dim=1):
        first = torch.where(rows.any(-1), rows.byte().argmax(-1), kv_len)
        query = key[sum(part.shape[1] for part in firsts) :][: rows.shape[1]]
        if not torch.equal((key >= first[..., None]) & (key <= query[:, None]), rows):
            return None
        firsts.append(first)
    first = torch.cat(firsts, dim=1)  # the first key each query sees; behind the last key where it sees none
    before = torch.nn.functional.pad(first, (1, 0), value=-1)[:, :-1]
    starts = first == key
    if not bool((starts | (first == before) | (first == kv_len)).all()):
        return None
    first = first.expand(batch, -1)
    offset = torch.arange(batch, device=key.device)[:, None] * kv_len
    start, length = (first + offset)[first < kv_len].unique(return_counts=True)
    return _packs(dict(torch.stack([start, length], dim=1).tolist()), key.device) or None


def _packs(documents: dict[int, int], device: torch.device) -> tuple[Pack, ...]:
    """Documents ``{first of the batch * length tokens: length}`` by length, so that padding at most doubles them."""
    groups: dict[int, list[int]] = {}
    for start, length in documents.items():
        groups.setdefault(max(_SHORT, (length - 1).bit_length()), []).append(start)
    packs = []
    for starts in groups.values():
        lengths = [documents[start] for start in starts]
        start, length = torch.tensor([starts, lengths], device=device)[..., None]
        place = torch.arange(max(lengths), device=device)
        real = place < length
        packs.append(Pack(torch.where(real, start + place, start), None if min(lengths) == max(lengths) else real))
    return tuple(packs)


def attend_documents(
    attend: Attend, attention: Attention, documents: tuple[Pack, ...] | None, probabilities: bool = False
) -> Result:
    """Run an attention of one segment, whose mask shows these documents; without documents, as it is.

    It keeps the dense mask in four cases: the backend refuses the documents, a bias depends on the place in the row,
    probabilities are asked for, or the attention has more masks.
    """
    (segment,) = attention.segments
    more = (attention.query_mask, attention.empty, segment.key_mask)
    if documents is None or probabilities or not _moves(segment.bias) or any(one is not None for one in more):
        return attend(attention, probabilities)
    parts = [pack.of(attention) for pack in documents]
    if not all(map(attend.takes, parts)):
        return attend(attention)
    results = [attend(part) for part in parts]
    values = torch.cat([pack.tokens(result.output) for pack, result in zip(documents, results, strict=True)])
    tokens = values.new_zeros((attention.batch * attention.q_len, *values.shape[1:]))
    tokens = tokens.index_copy(0, torch.cat([pack.places for pack in documents]), values)
    kernel = "+".join(dict.fromkeys(result.kernel for result in results))
    return Result(tokens.unflatten(0, (attention.batch, -1)).transpose(1, 2), kernel)


def _moves(bias: Bias | None) -> bool:
    """Whether a bias is the same for a document wherever it stands: one by distance alone."""
    return bias is None or (type(bias) is RelativeBias and bias.positions is None and not bias.offset)
