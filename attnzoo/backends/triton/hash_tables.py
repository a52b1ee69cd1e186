"""What the kernels read of the hash rounds of ``HashedChunks``: the chunk of each query and key, and ranges of chunks.

The kernels read the sorted order of keys and queries where they load rows, so no key and no query is gathered before.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from attnzoo.spec.hashed import HashedChunks, HashRound
from attnzoo.spec.segments import Attention


@dataclass(frozen=True, eq=False)
class HashTables:
    """The tables of one segment. The chunk indices of all its rounds lie side by side, as the kernels read them.

    Attributes:
        keys: ``(batch, kv_heads, kv_len)`` int64, the key at each rank of this round.
        chunks: ``(batch, kv_len)`` int64, the chunk of each rank of this round.
        starts: ``(batch, kv_len + 1)`` int32, the first rank of each chunk of this round.
        query_chunks: ``(batch, heads, q_len, all rounds)`` int32, the chunks of each query, this round after the
            earlier rounds. Later rounds of the attention may follow.
        key_chunks: ``(batch, kv_heads, kv_len, all rounds)`` int32, the same of each key.
        earlier: the number of earlier rounds.
    """

    keys: Tensor
    chunks: Tensor
    starts: Tensor
    query_chunks: Tensor
    key_chunks: Tensor
    earlier: int

    @property
    def rounds(self) -> int:
        """The number of all rounds."""
        return self.key_chunks.shape[3]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return all tensors."""
        return self.keys, self.chunks, self.starts, self.query_chunks, self.key_chunks

    def query_starts(self, order: Tensor) -> Tensor:
        """Return the place in ``order`` of the first query of each chunk: ``(batch, heads, kv_len + 1)`` int32.

        Only the gradients of keys and values need this table. ``order`` is the order of the queries of this round.
        """
        return _starts(self.query_chunks[..., self.earlier].gather(2, order), self.keys.shape[2])


def hash_tables(attention: Attention) -> dict[int, HashTables]:
    """Return the tables of each segment that is a hash round, by the index of the segment."""
    patterns = {
        index: segment.pattern
        for index, segment in enumerate(attention.segments)
        if isinstance(segment.pattern, HashedChunks)
    }
    # The earlier rounds of a segment are usually the rounds of other segments, which then share chunk indices.
    most_rounds_first = sorted(patterns.items(), key=lambda item: -len(item[1].rounds))
    numbered: list[tuple[tuple[HashRound, ...], Tensor, Tensor]] = []
    starts: dict[int, tuple[Tensor, Tensor]] = {}
    tables = {}
    for index, pattern in most_rounds_first:
        rounds, current = pattern.rounds, pattern.rounds[-1]
        known = next((entry for entry in numbered if all(map(is_, entry[0], rounds))), None)
        if known is None:
            known = (rounds, _numbers([r.query_chunks() for r in rounds]), _numbers([r.key_chunks() for r in rounds]))
            numbered.append(known)
        if id(current.chunks) not in starts:
            chunks = current.chunks.contiguous()
            starts[id(current.chunks)] = chunks, _starts(chunks, chunks.shape[1])
        tables[index] = HashTables(
            current.keys.contiguous(), *starts[id(current.chunks)], known[1], known[2], len(rounds) - 1
        )
    return tables


def _numbers(chunks: list[Tensor]) -> Tensor:
    return torch.stack(chunks, dim=-1).int()


def _starts(ascending: Tensor, count: int) -> Tensor:
    """Return where each of the chunks 0 to ``count`` starts in a tensor ``(..., n)`` of ascending chunk indices."""
    chunks = torch.arange(count + 1, dtype=ascending.dtype, device=ascending.device)
    return torch.searchsorted(ascending, chunks.repeat(*ascending.shape[:-1], 1), out_int32=True)
