"""The backend ``eager``, which is also the oracle: its results define correctness.

This backend computes scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762) in plain torch operations,
with one softmax over all segments. Scores, masks and biases need memory of size ``batch x heads x q_len x kv_len``.
Use this backend to check results and to get probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.backend import Backend, Capabilities
from attnzoo.spec.chosen_blocks import ChosenBlocks
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import FLOATS, Attention, Result, Segment
from attnzoo.spec.transforms import TRANSFORMS


def evaluate(attention: Attention, rows: Tensor | None = None) -> Result:
    """Compute an attention as the definition says, in the dtype of the tensors, and return the result.

    In half precision, the softmax runs in float32, as in models.

    Args:
        attention: the attention to compute.
        rows: ``(n,)`` indices of the query rows to compute. None means all rows.

    Returns:
        The output ``(batch, heads, n, value_dim)``, and the probabilities per segment before and after dropout.
    """
    if rows is None:
        rows = torch.arange(attention.q_len, device=attention.query.device)
    scores, seen = grid(attention, rows)
    has_visible_key = seen.any(-1, keepdim=True)
    # A row without visible keys keeps finite scores and gets weight 0, because -inf would give NaN and NaN gradients.
    scores = scores.masked_fill(~seen & has_visible_key, float("-inf"))
    half = scores.dtype in (torch.bfloat16, torch.float16)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32 if half else None).to(scores.dtype) * has_visible_key
    if attention.query_mask is not None:
        weights = weights * attention.query_mask[:, None, rows, None]
    lengths = [segment.kv_len for segment in attention.segments]
    weights, probabilities = _split(weights, lengths)
    dropped, after_dropout = weights, probabilities
    if attention.dropout > 0.0:
        dropped, after_dropout = _split(torch.nn.functional.dropout(weights, attention.dropout), lengths)
    output = attention.fill(dropped @ joined_values(attention), has_visible_key.squeeze(-1), rows)
    return Result(output, "eager", probabilities, after_dropout)


def _split(weights: Tensor, lengths: list[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return one tensor with the weights of all segments, and one tensor per segment.

    If the weights require grad, the first tensor is a concatenation of the others. So the output depends on the weights
    of each segment, and users can read the gradient of these weights (``retain_grad``), as in models.
    """
    if len(lengths) == 1:
        return weights, (weights,)
    parts = weights.split(lengths, dim=-1)
    return torch.cat(parts, dim=-1) if weights.requires_grad else weights, parts


def log_mass(attention: Attention, rows: Tensor) -> Tensor:
    """Return the log-sum-exp ``(batch, heads, n)`` of the scores of visible keys, ``-inf`` if a row sees no key."""
    scores, seen = grid(attention, rows)
    return scores.masked_fill(~seen, float("-inf")).logsumexp(-1)


def grid(attention: Attention, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of query rows ``(n,)`` and all keys, and a bool mask that is True where a query sees a key.

    Both have shape ``(batch, heads, n, kv_len of all segments)``. Scores contain scale and bias, and are finite.
    """
    query = attention.query[:, :, rows]
    grids = [_scores(attention, segment, query, rows) for segment in attention.segments]
    scores = torch.cat([score for score, _ in grids], dim=-1)
    return scores, torch.cat([mask.expand(attention.batch, attention.heads, -1, -1) for _, mask in grids], dim=-1)


def joined_values(attention: Attention) -> Tensor:
    """Return the values of all segments, concatenated: ``(batch, heads, kv_len of all segments, value_dim)``."""
    return torch.cat([expand_heads(segment.value, attention.heads) for segment in attention.segments], dim=2)


def _scores(attention: Attention, segment: Segment, query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    kv = torch.arange(segment.kv_len, device=query.device)
    scores = query @ expand_heads(segment.key, attention.heads).transpose(-1, -2) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    bias = segment.bias_at(rows, kv, attention.q_len)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    seen = segment.visible(rows, kv, attention.q_len)
    if seen is None:
        seen = torch.ones((1, 1, len(rows), segment.kv_len), dtype=torch.bool, device=query.device)
    return scores, seen.expand(-1, -1, len(rows), -1)


@dataclass(frozen=True)
class EagerBackend(Backend):
    """The oracle as a backend. It supports every pattern, mask, bias and dtype, and returns probabilities."""

    name: ClassVar[str] = "eager"
    priority: ClassVar[int] = -100
    dense: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset(FLOATS),
        patterns=frozenset({Full, Causal, Window, Chunks, SortedChunks, HashedChunks, ChosenBlocks}),
        segments=1 << 16,
        key_mask=True,
        mask=True,
        bias=frozenset({"relative", "dense"}),
        bias_grad=True,
        gqa=True,
        uneven_value_dim=True,
        dropout=True,
        grad=True,
        softcap=True,
        probabilities=True,
        transforms=TRANSFORMS,
    )

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        result = evaluate(attention)
        return result if probabilities else Result(result.output, result.kernel)
