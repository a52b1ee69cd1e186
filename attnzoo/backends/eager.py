"""``eager``: the oracle. Evaluates masks and biases on dense index grids; defines what is correct.

Standard scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762) in plain torch operations, with one
softmax over all segments. Memory is ``batch x heads x q_len x kv_len``: for judging and for looking at probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.backend import Backend, Capabilities
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import FLOATS, Attention, Result, Segment
from attnzoo.spec.transforms import TRANSFORMS


def evaluate(attention: Attention, rows: Tensor | None = None) -> Result:
    """The attention by definition, in the dtype of its tensors (half precision: softmax in float32, as models do).

    Args:
        attention: what to compute.
        rows: query indices ``(n,)`` to compute; the others are left out. None: all of them.

    Returns:
        Output ``(batch, heads, n, value_dim)`` with the probabilities of each segment, before and after dropout.
    """
    if rows is None:
        rows = torch.arange(attention.q_len, device=attention.query.device)
    scores, seen = grid(attention, rows)
    live = seen.any(-1, keepdim=True)
    # A row that sees nothing gets finite scores and then weight zero, so that neither it nor its gradient is NaN.
    scores = scores.masked_fill(~seen & live, float("-inf"))
    half = scores.dtype in (torch.bfloat16, torch.float16)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32 if half else None).to(scores.dtype) * live
    if attention.query_mask is not None:
        weights = weights * attention.query_mask[:, None, rows, None]
    lengths = [segment.kv_len for segment in attention.segments]
    weights, probabilities = _by_segment(weights, lengths)
    dropped, after_dropout = weights, probabilities
    if attention.dropout > 0.0:
        dropped, after_dropout = _by_segment(torch.nn.functional.dropout(weights, attention.dropout), lengths)
    output = attention.fill(dropped @ joined_values(attention), live.squeeze(-1), rows)
    return Result(output, "eager", probabilities, after_dropout)


def _by_segment(weights: Tensor, lengths: list[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Weights of all segments, and those of each.

    Where gradients flow, the first is made of the second, so that what is returned as probabilities lies on the way to
    the output and gets a gradient (``retain_grad``), as it does in models.
    """
    if len(lengths) == 1:
        return weights, (weights,)
    parts = weights.split(lengths, dim=-1)
    return torch.cat(parts, dim=-1) if weights.requires_grad else weights, parts


def log_mass(attention: Attention, rows: Tensor) -> Tensor:
    """The log-sum-exp of the scores that query rows ``(n,)`` see: ``(batch, heads, n)``, ``-inf`` for nothing."""
    scores, seen = grid(attention, rows)
    return scores.masked_fill(~seen, float("-inf")).logsumexp(-1)


def grid(attention: Attention, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled and biased scores of query rows ``(n,)`` at the keys of all segments, and which of these the rows see.

    Both are ``(batch, heads, n, kv_len of all segments)``; scores are finite where nothing is seen.
    """
    query = attention.query[:, :, rows]
    grids = [_scores(attention, segment, query, rows) for segment in attention.segments]
    scores = torch.cat([score for score, _ in grids], dim=-1)
    return scores, torch.cat([mask.expand(attention.batch, attention.heads, -1, -1) for _, mask in grids], dim=-1)


def joined_values(attention: Attention) -> Tensor:
    """The values of all segments, one after the other: ``(batch, heads, kv_len of all segments, value_dim)``."""
    return torch.cat([expand_heads(segment.value, attention.heads) for segment in attention.segments], dim=2)


def _scores(attention: Attention, segment: Segment, query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled and biased scores, and who sees whom: ``(batch, heads, n, kv_len)`` and broadcastable to it."""
    kv = torch.arange(segment.kv_len, device=query.device)
    scores = query @ expand_heads(segment.key, attention.heads).transpose(-1, -2) * attention.scale
    bias = segment.bias_at(rows, kv, attention.q_len, attention.batch, attention.heads)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    seen = segment.visible(rows, kv, attention.q_len)
    if seen is None:
        seen = torch.ones((1, 1, len(rows), segment.kv_len), dtype=torch.bool, device=query.device)
    return scores, seen.expand(-1, -1, len(rows), -1)


@dataclass(frozen=True)
class EagerBackend(Backend):
    """The dense oracle as a backend: every pattern, mask, bias and dtype, and the attention probabilities."""

    name: ClassVar[str] = "eager"
    priority: ClassVar[int] = -100
    dense: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset(FLOATS),
        patterns=frozenset({Full, Causal, Window, Chunks, SortedChunks, HashedChunks}),
        segments=1 << 16,
        key_mask=True,
        mask=True,
        bias=frozenset({"relative", "dense"}),
        bias_grad=True,
        gqa=True,
        uneven_value_dim=True,
        dropout=True,
        grad=True,
        probabilities=True,
        transforms=TRANSFORMS,
    )

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        result = evaluate(attention)
        return result if probabilities else Result(result.output, result.kernel)
