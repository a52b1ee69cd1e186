"""``flash_attention_2``: under construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnzoo.backend import Backend


@dataclass(frozen=True)
class FlashBackend(Backend):
    """Under construction."""

    name: ClassVar[str] = "flash_attention_2"
    aliases: ClassVar[tuple[str, ...]] = ("flash", "fa2")

    @classmethod
    def unavailable(cls) -> str | None:
        return "not built yet"
