"""The text that the models read: chapters of a book as bytes. Each byte is one token.

The repository and the source distribution have 31 chapters. A wheel has the first 32768 bytes, which are enough for the
commands by default, because the rest would be a fifth of the wheel. ``data/SOURCE.md`` names the source of the text.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError

BOOK = Path(__file__).parent / "data" / "moby_dick.txt"
START = BOOK.with_name("moby_dick_start.txt")


@lru_cache(maxsize=1)
def book() -> bytes:
    """Return the text. If it is not cut, it has four passages of 65536 tokens, the longest input (of Reformer)."""
    return (BOOK if BOOK.exists() else START).read_bytes()


def require_tokens(count: int) -> None:
    """Raise InvalidArgumentError if ``count`` tokens are more than the start of the book, and the rest is missing."""
    if count > len(book()) and not BOOK.exists():
        allowed = (
            f"at most {len(book())} tokens in all passages, or the whole text: copy benchmarks/data/{BOOK.name} from "
            f"the source distribution (pip download --no-deps --no-binary attnzoo attnzoo) to {BOOK.parent}"
        )
        raise InvalidArgumentError("seq-len", f"{count} tokens of text", allowed)


def read_tokens(batch: int, length: int, offset: int) -> Tensor:
    """Return token ids ``(batch, length)``: ``offset`` plus the bytes of the book. Repeat the book if necessary.

    Raise InvalidArgumentError if a cut book would be repeated, because repeated text is easier for hashed attention.
    """
    require_tokens(batch * length)
    text = torch.frombuffer(bytearray(book()), dtype=torch.uint8)
    index = torch.arange(batch * length) % len(text)
    return text[index].long().view(batch, length) + offset
