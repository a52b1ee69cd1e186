"""``tiled``: attention by tiles of queries and keys with a running softmax, in plain torch operations.

It applies the online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867) to tiles, as FlashAttention does (Dao et
al. 2022, arXiv:2205.14135). Score matrices are at most ``tile x tile``. Autograd computes the backward. This example is
not fast.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import attnzoo


@dataclass(frozen=True)
class TiledBackend(attnzoo.Backend):
    """Backend that computes attention by tiles. Fields are options: ``attnzoo.patch(model, "tiled", tile=16)``."""

    tile: int = 32

    name: ClassVar[str] = "tiled"
    aliases: ClassVar[tuple[str, ...]] = ("online-softmax",)
    priority: ClassVar[int] = -50  # `auto` prefers every other backend except the dense oracle
    # attnzoo refuses every request that is not declared here. CUDA is not declared, because it was never tested.
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
            raise attnzoo.InvalidArgumentError("tile", repr(self.tile), "an integer >= 1")

    def run(self, attention: attnzoo.Attention, probabilities: bool = False) -> attnzoo.Result:
        starts = range(0, attention.q_len, self.tile)
        tiles = [self._queries(attention, start, min(start + self.tile, attention.q_len)) for start in starts]
        outputs, visible = zip(*tiles, strict=True)
        # `fill` overwrites the rows of queries that see no key, and padding rows.
        output = attention.fill(torch.cat(outputs, dim=2).to(attention.query.dtype), torch.cat(visible, dim=2))
        return attnzoo.Result(output, "tiled")

    def _queries(self, attention: attnzoo.Attention, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the output ``(batch, heads, n, value_dim)`` of queries ``start:stop``, and which queries see a key."""
        batch, heads, q_len = attention.batch, attention.heads, attention.q_len
        # Sums of half precision are computed in float32.
        dtype = torch.promote_types(attention.query.dtype, torch.float32)
        rows = torch.arange(start, stop, device=attention.query.device)
        query = attention.query[:, :, start:stop].to(dtype) * attention.scale
        least = torch.finfo(dtype).min
        largest = query.new_full((batch, heads, len(rows), 1), least)  # largest score so far
        total = query.new_zeros((batch, heads, len(rows), 1))  # sum of exp(score - largest)
        summed = query.new_zeros((batch, heads, len(rows), attention.value_dim))  # sum of exp(score - largest) * value
        for segment in attention.segments:
            for begin, end in self._tiles(segment, start, stop, q_len):
                keys = torch.arange(begin, end, device=rows.device)
                key, value = (
                    _expand(tensor[:, :, begin:end].to(dtype), heads) for tensor in (segment.key, segment.value)
                )
                scores = query @ key.transpose(-1, -2)
                bias = segment.bias_at(rows, keys, q_len)
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
        # The total of a row that sees a key is at least 1, because the largest score adds exp(0).
        return summed / total.clamp(min=1.0), total.squeeze(-1) > 0.0

    def _tiles(self, segment: attnzoo.Segment, start: int, stop: int, q_len: int) -> list[tuple[int, int]]:
        """Return the ranges of keys that queries ``start:stop`` can see, cut into tiles."""
        spans = segment.pattern.kv_spans(start, stop, q_len, segment.kv_len)
        return [(k, min(k + self.tile, end)) for begin, end in spans for k in range(begin, end, self.tile)]


def _expand(tensor: Tensor, heads: int) -> Tensor:
    """Expand ``(batch, kv_heads, n, d)`` to ``(batch, heads, n, d)``. Neighbouring query heads share a key head."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
