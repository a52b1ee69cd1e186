"""The backward of blocks with a trained bias, in plain operations.

This module is needed because PyTorch's CPU kernel returns no gradients of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.backends.common.blocks import Block, Masks, Part
from attnzoo.spec.bias import Bias
from attnzoo.spec.segments import Attention


def trained_biases(attention: Attention) -> dict[int, Bias]:
    """Return the biases that get a gradient, by the index of the segment."""
    return {
        index: segment.bias
        for index, segment in enumerate(attention.segments)
        if segment.bias is not None and segment.bias.values.requires_grad
    }


def backward_by_hand(
    rows: Sequence[Tensor],
    pairs: Sequence[Sequence[Tensor]],
    masks: Sequence[Tensor | None],
    scale: float,
    is_whole: bool,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the gradients of query, key, value and scores for each part.

    Args:
        rows: grad_out, query, out and lse of the queries of a block.
        pairs: key and value of each part.
        masks: the additive mask of each part, or None.
        scale: the factor on the scores.
        is_whole: whether the parts contain all keys that the queries see. If False, the queries see further keys in
            other passes, so this function computes the weights from lse. If True, this function computes the softmax
            of all parts again, which is more exact. The exact score gradients of a query sum to zero. With the rounded
            out and lse of the kernel, this sum has a larger error, and a bias gradient adds the errors of many queries.
    """
    grad_out, query, out, lse = rows
    wide = lse.dtype
    grad_out, query = grad_out.to(wide), query.to(wide)
    keys, values = ([pair[index].to(wide) for pair in pairs] for index in (0, 1))
    # All tensors below are new, so they may change in place. New memory is slow at the first write.
    scores = [_scaled_(query @ key.transpose(-1, -2), scale) for key in keys]
    joined = _join([score if mask is None else score.add_(mask) for score, mask in zip(scores, masks, strict=True)])
    grad_scores = _join([grad_out @ value.transpose(-1, -2) for value in values])
    if is_whole:
        # All scores of a row that sees no key are -inf. The clamps make the weights 0 instead of 0 / 0.
        joined.sub_(joined.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)).exp_()
        weights = joined.div_(joined.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny))
        mean = torch.linalg.vecdot(weights, grad_scores).unsqueeze(-1)
    else:
        weights = joined.sub_(lse[..., None]).exp_()
        mean = (grad_out * out).sum(-1, keepdim=True)
    grad_scores.sub_(mean).mul_(weights)
    lengths = [key.shape[2] for key in keys]
    split = zip(weights.split(lengths, -1), grad_scores.split(lengths, -1), keys, strict=True)
    return [
        (
            _scaled_(grad @ key, scale),
            _scaled_(grad.transpose(-1, -2) @ query, scale),
            weight.transpose(-1, -2) @ grad_out,
            grad,
        )
        for weight, grad, key in split
    ]


def _scaled_(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor.mul_(scale)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class BiasGradients:
    """Accumulator of the gradients of trained biases.

    This class sums the score gradients of consecutive blocks with equal masks and biases, and adds only each sum to the
    bias gradient.
    """

    def __init__(self, attention: Attention) -> None:
        self._attention, self._masks, self._biases = attention, Masks(attention), trained_biases(attention)
        # The gradient of one value may sum over all scores. The exact sum is often near 0, so float32 is too inexact.
        self._grads = {i: torch.zeros_like(bias.values, dtype=torch.float64) for i, bias in self._biases.items()}
        self._sums: dict[int, tuple[object, Block, Part, Tensor]] = {}

    def __contains__(self, segment: int) -> bool:
        return segment in self._biases

    def add(self, block: Block, part: Part, grad_scores: Tensor) -> None:
        key, last = self._masks.key(block, part), self._sums.get(part.segment)
        if last is not None and key is not None and last[0] == key:
            last[3].add_(grad_scores)
            return
        self._flush(part.segment)
        self._sums[part.segment] = (key, block, part, grad_scores.double())

    def finished(self) -> list[Tensor]:
        """Return the gradients in segment order. Each gradient has the dtype of the bias values."""
        for segment in self._biases:
            self._flush(segment)
        return [grad.to(self._biases[index].values.dtype) for index, grad in self._grads.items()]

    def _flush(self, index: int) -> None:
        if index not in self._sums:
            return
        _, block, part, total = self._sums.pop(index)
        q, kv = (torch.arange(*ends, device="cpu") for ends in (block[:2], part[1:3]))
        lengths = (self._attention.q_len, self._attention.segments[index].kv_len)
        self._biases[index].add_gradient_(self._grads[index], total, q, kv, *lengths)
