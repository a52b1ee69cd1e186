"""The pattern of block-sparse attention: a list of blocks of keys for each block of queries, such as random blocks.

BigBird (Zaheer et al. 2020, arXiv:2007.14062) combines such blocks with a window and with global blocks, which are
separate segments. So a key that two of them contain is in the softmax twice, as in the code of BigBird.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.patterns import MaskMod, Pattern


@dataclass(frozen=True)
class ChosenBlocks(Pattern):
    """Blocks of ``length`` tokens. A query sees the blocks of keys that are chosen for its block and head.

    Query ``i`` is in block ``i // length``, and key ``j`` in block ``j // length``. The last blocks may be shorter. A
    block of keys that is listed twice counts once.

    Attributes:
        length: the number of tokens in a block.
        chosen: ``(batch, heads, blocks of queries, n)`` int64, the indices of the blocks of keys. An index outside of
            the keys, such as -1, stands for no block.

    Raises:
        InvalidArgumentError: ``length < 1``. :meth:`check` raises if ``chosen`` has another shape or dtype.

    Example:
        >>> pattern = ChosenBlocks(4, torch.tensor([[[[1], [-1]]]]))  # the first of two blocks sees the second
        >>> [keys.tolist() for keys in pattern.gathered(0, 4, q_len=8, kv_len=8)]
        [[[[4, 5, 6, 7]]]]
    """

    length: int
    chosen: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise InvalidArgumentError("block length", repr(self.length), "an integer >= 1")

    @property
    def structure(self) -> Pattern:
        return replace(self, chosen=None)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        expected = (batch, heads, -(-q_len // self.length))
        chosen = self.chosen
        if chosen is None or chosen.ndim != 4 or tuple(chosen.shape[:3]) != expected or chosen.dtype != torch.long:
            got = None if chosen is None else f"shape {tuple(chosen.shape)}, {chosen.dtype}"
            raise InvalidArgumentError("chosen of the pattern", got, f"shape {(*expected, 'n')}, torch.int64")

    def batch_and_heads(self, device: torch.device) -> tuple[Tensor, Tensor]:
        batch, heads = (torch.arange(size, device=device) for size in self._given().shape[:2])
        return batch[:, None, None, None], heads[None, :, None, None]

    def mask_mod(self, q_len: int, kv_len: int) -> MaskMod:
        chosen = self._given()

        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            of_query, block = chosen[b, h, q // self.length], kv // self.length
            return (of_query == block[..., None]).any(-1)

        return mask

    def block_size(self, q_len: int, kv_len: int) -> int:
        return min(q_len, self.length)

    def gathered(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> Iterator[Tensor]:
        """Yield the indices ``(batch, heads, m)`` of the keys in all blocks that the queries ``q_start:q_stop`` see."""
        first, last = q_start // self.length, (q_stop - 1) // self.length
        blocks = self._given()[:, :, first : last + 1].flatten(2).sort(dim=-1).values
        repeated = torch.nn.functional.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0))
        keys = blocks[..., None] * self.length + torch.arange(self.length, device=blocks.device)
        hidden = ((blocks < 0) | repeated)[..., None] | (keys >= kv_len)
        yield keys.masked_fill(hidden, -1).flatten(2)

    def sees_gathered(self, q_start: int, q_stop: int) -> bool:
        return q_start // self.length == (q_stop - 1) // self.length

    def _given(self) -> Tensor:
        if self.chosen is None:
            raise InvalidArgumentError("pattern", f"{self} without chosen", "a pattern with chosen")
        return self.chosen
