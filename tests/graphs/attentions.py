"""Attentions with every field that an operator must pass on."""

import torch

from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.patterns import Causal, Chunks, Full, Window
from attnzoo.spec.segments import Attention, Segment

BATCH, HEADS, DIM = 2, 2, 8


def tokens(length, seed=0):
    """Return query, key and value ``(3, batch, heads, length, dim)``."""
    return torch.randn(3, BATCH, HEADS, length, DIM, generator=torch.Generator().manual_seed(seed))


def _segments():
    q, k, v = tokens(8).unbind()
    _, side, side_values = tokens(3, seed=1).unbind()
    key_mask = torch.tensor([[True] * 8, [False] * 3 + [True] * 5])
    mask = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.7
    table = torch.linspace(-1.0, 1.0, HEADS * 5).view(HEADS, 5)
    positions = torch.arange(8).div(3, rounding_mode="floor").expand(BATCH, -1).contiguous()
    return {
        "full": (q, Segment(k, v)),
        "causal": (q, Segment(k, v, Causal(), key_mask)),
        "window": (q, Segment(k, v, Window(2, 1), key_mask, bias=RelativeBias(table, zero=2))),
        "chunks": (q, Segment(k, v, Chunks(4, 1, 0)), Segment(k, v, Chunks(4, -1, 1))),
        "mask": (q, Segment(k, v, Full(), None, mask, DenseBias(torch.arange(64.0).view(1, 1, 8, 8) / 64))),
        "sides": (
            q,
            Segment(k, v, Window(2, 2), bias=RelativeBias(table, 2, offset=1)),
            Segment(side, side_values, bias=RelativeBias(table, 2, None, positions)),
        ),
        "shared heads": (q, Segment(k[:, :1], v[:, :1], Causal(offset=0))),
    }


ATTENTIONS = {name: Attention(query, tuple(rest), 0.5) for name, (query, *rest) in _segments().items()}
_q, _k, _v = tokens(8).unbind()
ATTENTIONS["query mask"] = Attention(
    _q, (Segment(_k, _v, Window(2, 0)),), 0.5, query_mask=torch.tensor([[True] * 8, [False] * 3 + [True] * 5])
)
ATTENTIONS["empty"] = Attention(_q, (Segment(_k, _v, Causal(offset=-1)),), 0.5, empty=_v + 1.0)
ATTENTIONS["softcap"] = Attention(_q, (Segment(_k, _v),), 0.5, softcap=2.0)
