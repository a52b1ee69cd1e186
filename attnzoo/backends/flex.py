"""``flex_attention``: under construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnzoo.backend import Backend


@dataclass(frozen=True)
class FlexBackend(Backend):
    """Under construction."""

    name: ClassVar[str] = "flex_attention"
    aliases: ClassVar[tuple[str, ...]] = ("flex",)

    @classmethod
    def unavailable(cls) -> str | None:
        return "not built yet"
