"""Uniting partial softmaxes exactly.

Attention over a union of key sets follows from the attention over each: with ``lse`` the log-sum-exp of a part's
scores, ``lse = logsumexp(lse_i)`` and ``out = sum(exp(lse_i - lse) * out_i)`` (Milakov & Gimelshein 2018,
arXiv:1805.02867; used across devices by Ring Attention, arXiv:2310.01889). The backward of each part is exact when it
is given the *final* out and lse, because a softmax's gradient needs nothing else of the other parts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Unite a further part into ``out`` and ``lse``, in place.

    Args:
        out: ``(..., n, d)``, the union so far, in the accumulation dtype.
        lse: ``(..., n)``, its log-sum-exp; ``-inf`` where nothing was seen yet.
        part_out: ``(..., n, d)``, the attention over the further keys.
        part_lse: ``(..., n)``; ``-inf`` where the part's row sees nothing (its ``part_out`` must be finite there).
    """
    share = torch.sigmoid(part_lse - lse)  # exp(part_lse - total), and one minus it is exp(lse - total): they sum to 1
    share = share.masked_fill_(part_lse == float("-inf"), 0.0)
    out.lerp_(part_out.to(out.dtype), share.to(out.dtype).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))
