"""The text that the models read: chapters of a book as bytes. Each byte is one token."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

BOOK = Path(__file__).parent / "data" / "moby_dick.txt"  # data/SOURCE.md names the source of the text


@lru_cache(maxsize=1)
def book() -> bytes:
    """Return the text. It is long enough for four passages of 65536 tokens, the longest input (of Reformer)."""
    return BOOK.read_bytes()


def read_tokens(batch: int, length: int, offset: int) -> Tensor:
    """Return token ids ``(batch, length)``: ``offset`` plus the bytes of the book. Repeat the book if necessary."""
    text = torch.frombuffer(bytearray(book()), dtype=torch.uint8)
    index = torch.arange(batch * length) % len(text)
    return text[index].long().view(batch, length) + offset
