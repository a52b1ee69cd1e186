"""``tiled``: attention by tiles of queries and keys with a running softmax, in plain torch operations.

The online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867) over tiles, as in FlashAttention (Dao et al. 2022,
arXiv:2205.14135): no score matrix is larger than ``tile x tile``. Autograd computes the backward. The code is an
example and not fast.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import attnzoo


@dataclass(frozen=True)
class TiledBackend(attnzoo.Backend):
    """Attention by tiles. The fields are the options: ``attnzoo.patch(model, "tiled", tile=16)``."""

    tile: int = 32

    name: ClassVar[str] = "tiled"
    aliases: ClassVar[tuple[str, ...]] = ("online-softmax",)
    priority: ClassVar[int] = -50  # `auto` prefers every other backend except the dense oracle
    # attnzoo refuses every request that is not declared here. The backend was never run on CUDA.
    capabilities: ClassVar[attnzoo.Capabilities] = attnzoo.Capabilities(
        devices=frozenset({"cpu"}),
        patterns=frozenset({attnzoo.Full, attnzoo.Causal, attnzoo.Window, attnzoo.Chunks}),
        segments=1 << 16,
        key_mask=True,
        mask=True,
        bias=frozenset({"relative", "dense"}),
        bias_grad=True,
        gqa=True,
        uneven_value_dim=True,
        grad=True,
    )

    def __post_init__(self) -> None:
        if isinstance(self.tile, bool) or not isinstance(self.tile, int) or self.tile < 1:
            raise attnzoo.InvalidArgumentError("tile", repr(self.tile), "a positive integer")

    def run(self, attention: attnzoo.Attention, probabilities: bool = False) -> attnzoo.Result:
        starts = range(0, attention.q_len, self.tile)
        tiles = [self._queries(attention, start, min(start + self.tile, attention.q_len)) for start in starts]
        outputs, visible = zip(*tiles, strict=True)
        # `fill` sets the rows that see no key, and padding rows.
        output = attention.fill(torch.cat(outputs, dim=2).to(attention.query.dtype), torch.cat(visible, dim=2))
        return attnzoo.Result(output, "tiled")

    def _queries(self, attention: attnzoo.Attention, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the output ``(batch, heads, n, value_dim)`` of queries ``start:stop``, and which of them see a key."""
        batch, heads, q_len = attention.batch, attention.heads, attention.q_len
        # Half precision is summed in float32.
        dtype = torch.promote_types(attention.query.dtype, torch.float32)
        rows = torch.arange(start, stop, device=attention.query.device)
        query = attention.query[:, :, start:stop].to(dtype) * attention.scale
        least = torch.finfo(dtype).min
        largest = query.new_full((batch, heads, len(rows), 1), least)  # score so far
        total = query.new_zeros((batch, heads, len(rows), 1))  # of exp(score - largest) so far
        summed = query.new_zeros((batch, heads, len(rows), attention.value_dim))  # of exp(score - largest) * value
        for segment in attention.segments:
            for begin, end in self._tiles(segment, start, stop, q_len):
                keys = torch.arange(begin, end, device=rows.device)
                key, value = (
                    _expand(tensor[:, :, begin:end].to(dtype), heads) for tensor in (segment.key, segment.value)
                )
                scores = query @ key.transpose(-1, -2)
                bias = segment.bias_at(rows, keys, q_len, batch, heads)
                scores = scores if bias is None else scores + bias.to(dtype)
                seen = segment.visible(rows, keys, q_len)  # the pattern and the masks; None if all are visible
                scores = scores if seen is None else scores.masked_fill(~seen, least)
                larger = torch.maximum(largest, scores.detach().amax(-1, keepdim=True))
                weights = torch.exp(scores - larger)
                weights = weights if seen is None else weights * seen
                rescale = torch.exp(largest - larger)
                total = total * rescale + weights.sum(-1, keepdim=True)
                summed = summed * rescale + weights @ value
                largest = larger
        # The largest score of a row that sees a key adds exactly 1 to its total.
        return summed / total.clamp(min=1.0), total.squeeze(-1) > 0.0

    def _tiles(self, segment: attnzoo.Segment, start: int, stop: int, q_len: int) -> list[tuple[int, int]]:
        """Return the ranges of keys that these queries can see, cut into tiles."""
        spans = segment.pattern.kv_spans(start, stop, q_len, segment.kv_len)
        return [(k, min(k + self.tile, end)) for begin, end in spans for k in range(begin, end, self.tile)]


def _expand(tensor: Tensor, heads: int) -> Tensor:
    """Expand ``(batch, kv_heads, n, d)`` to ``(batch, heads, n, d)``: neighbouring query heads share a key head."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
