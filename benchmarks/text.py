"""The real text the benchmark reads: chapters of a book as bytes, one token per byte."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

BOOK = Path(__file__).parent / "data" / "moby_dick.txt"


@lru_cache(maxsize=1)
def book() -> bytes:
    """The installed chapters, long enough for four passages of the longest input (Reformer's 65536 tokens).

    ``data/SOURCE.md`` tells where they come from.
    """
    return BOOK.read_bytes()


def read_tokens(batch: int, length: int, offset: int) -> Tensor:
    """Token ids ``(batch, length)``: consecutive passages of the book, each byte plus ``offset``.

    After its end the text starts again.
    """
    text = torch.frombuffer(bytearray(book()), dtype=torch.uint8)
    index = torch.arange(batch * length) % len(text)
    return text[index].long().view(batch, length) + offset
