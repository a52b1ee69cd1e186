"""``xformers``: under construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnzoo.backend import Backend


@dataclass(frozen=True)
class XformersBackend(Backend):
    """Under construction."""

    name: ClassVar[str] = "xformers"
    aliases: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def unavailable(cls) -> str | None:
        return "not built yet"
