"""Blocked union attention in plain torch operations: any device, dropout, trained biases, and queries in any order.

Slower than a fused kernel, as small: scores exist for all queries and the keys near them, never ``q_len x kv_len`` for
a local pattern. Parts of a block share one softmax; passes (segments with an order of queries of their own) are united
by log-sum-exp (:mod:`attnzoo.backends.common.union`), here with torch's own gradients.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from attnzoo.backends.common.blocks import Block, Masks, block_size, blocks, passes
from attnzoo.backends.sdpa.pieces import Pieces, join_masks
from attnzoo.spec.segments import Attention

KERNEL = "math_blocks"
# Stands for the log-sum-exp of nothing: a constant without gradient, and exp() of its distance to anything else is 0.
_NOTHING = -1e30


def attend(attention: Attention) -> Tensor:
    """The attention's output ``(batch, heads, q_len, value_dim)``."""
    parts = [_pass(attention, group) for group in passes(attention)]
    output = parts[0][0]
    if len(parts) > 1:
        weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0)
        mixed = [weight[..., None] * out for weight, (out, _) in zip(weights, parts, strict=True)]
        output = reduce(torch.add, mixed).to(attention.query.dtype)
    live = torch.stack([lse > _NOTHING for _, lse in parts]).any(0)
    return attention.fill(output, live)


def _pass(attention: Attention, group: list[int]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the segments of one pass, queries in their own order."""
    plan = list(blocks(attention, group, block_size(attention)))
    pieces = {index: Pieces(attention, index, plan) for index in group}
    masks = Masks(attention)
    order = attention.segments[group[0]].pattern.query_order
    query = attention.query
    if order is not None:
        query = query.gather(2, order[..., None].expand(-1, -1, -1, query.shape[3]))
    rows = query.split([block.q_stop - block.q_start for block in plan], dim=2)
    results = [_block(attention, masks, pieces, block, q) for block, q in zip(plan, rows, strict=True)]
    output, lse = (torch.cat(tensors, dim=2) for tensors in zip(*results, strict=True))
    if order is not None:
        places = torch.argsort(order, dim=-1)
        output = output.gather(2, places[..., None].expand(-1, -1, -1, output.shape[3]))
        lse = lse.gather(2, places)
    return output, lse


def _block(
    attention: Attention, masks: Masks, pieces: dict[int, Pieces], block: Block, query: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
    if not block.parts:
        empty = query.sum(-1, keepdim=True).expand(-1, -1, -1, attention.value_dim) * 0.0
        return empty, torch.full(query.shape[:3], _NOTHING, dtype=wide, device=query.device)
    key = torch.cat([pieces[part.segment].key(part) for part in block.parts], dim=2)
    value = torch.cat([pieces[part.segment].value(part) for part in block.parts], dim=2)
    seen, bias = join_masks(attention, masks, block)
    scores = query @ key.transpose(-1, -2) * attention.scale
    if bias is not None:
        scores = scores + bias
    scores = scores.to(wide)
    dead: Tensor | None = None
    if seen is not None:
        dead = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~(seen | dead), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    # Not exp(scores - lse): lse is rounded, and what the weights of a row then lack of 1 would weigh in its gradient.
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    if attention.dropout > 0.0:
        weights = torch.nn.functional.dropout(weights, attention.dropout)
    output = weights @ value
    if dead is not None:
        output, lse = output.masked_fill(dead, 0.0), lse.masked_fill(dead, _NOTHING)
    return output, lse.squeeze(-1)
