"""Attention in blocks, in plain PyTorch operations, for any device, dropout, transforms and query order.

This code is slower than a fused kernel, but also needs little memory. For a local pattern, it computes only the scores
between each block of queries and the nearby keys. The parts of a block share one softmax. The results of several passes
are merged by log-sum-exp. This merge is not in place, unlike the merge of :mod:`attnzoo.backends.common.union`, because
autograd records it.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from attnzoo.backends.common.blocks import Block, Masks, block_size, blocks, passes
from attnzoo.backends.sdpa.pieces import KeyPieces, join_masks, join_parts
from attnzoo.spec.segments import Attention

KERNEL = "math_blocks"
# The log-sum-exp of a row that sees no key. The constant is so low that exp(_NOTHING - score) is 0 for any score.
_NOTHING = -1e30


def attend(attention: Attention) -> Tensor:
    """Return the output ``(batch, heads, q_len, value_dim)`` of an attention."""
    results = [_pass(attention, segments) for segments in passes(attention)]
    output = results[0][0]
    if len(results) > 1:
        weights = torch.softmax(torch.stack([lse for _, lse in results]), dim=0)
        weighted = [weight[..., None] * out for weight, (out, _) in zip(weights, results, strict=True)]
        output = reduce(torch.add, weighted).to(attention.query.dtype)
    visible_rows = torch.stack([lse > _NOTHING for _, lse in results]).any(0)
    return attention.fill(output, visible_rows)


def _pass(attention: Attention, segments: list[int]) -> tuple[Tensor, Tensor]:
    """Return output and lse ``(batch, heads, q_len)`` over the segments of one pass, with queries in sequence order."""
    all_blocks = list(blocks(attention, segments, block_size(attention)))
    pieces = {index: KeyPieces(attention, index, all_blocks) for index in segments}
    masks = Masks(attention)
    order = attention.segments[segments[0]].pattern.query_order
    query = attention.query
    if order is not None:
        query = query.gather(2, order[..., None].expand(-1, -1, -1, query.shape[3]))
    rows = query.split([block.rows for block in all_blocks], dim=2)
    results = [_block(attention, masks, pieces, block, q) for block, q in zip(all_blocks, rows, strict=True)]
    output, lse = (torch.cat(tensors, dim=2) for tensors in zip(*results, strict=True))
    if order is not None:
        places = torch.argsort(order, dim=-1)
        output = output.gather(2, places[..., None].expand(-1, -1, -1, output.shape[3]))
        lse = lse.gather(2, places)
    return output, lse


def _block(
    attention: Attention, masks: Masks, pieces: dict[int, KeyPieces], block: Block, query: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
    if not block.parts:
        empty = query.sum(-1, keepdim=True).expand(-1, -1, -1, attention.value_dim) * 0.0
        return empty, torch.full(query.shape[:3], _NOTHING, dtype=wide, device=query.device)
    key, value = join_parts(pieces, block)
    visible, bias = join_masks(attention, masks, block)
    scores = query @ key.transpose(-1, -2) * attention.scale
    if bias is not None:
        scores = scores + bias
    scores = scores.to(wide)
    hidden_rows: Tensor | None = None
    if visible is not None:
        hidden_rows = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~(visible | hidden_rows), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    # Not exp(scores - lse): lse is rounded, so the weights of a row would not sum to 1 and the gradient would be wrong.
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    if attention.dropout > 0.0:
        weights = torch.nn.functional.dropout(weights, attention.dropout)
    output = weights @ value
    if hidden_rows is not None:
        output, lse = output.masked_fill(hidden_rows, 0.0), lse.masked_fill(hidden_rows, _NOTHING)
    return output, lse.squeeze(-1)
