"""The support matrix, from the capabilities backends declare."""

from __future__ import annotations

from typing import Any

from attnzoo import registry
from attnzoo.backend import Capabilities

_FLAGS = ("key_mask", "mask", "bias_grad", "gqa", "uneven_value_dim", "dropout", "grad", "probabilities", "exact")


def matrix() -> list[dict[str, Any]]:
    """One row of plain data per registered backend."""
    rows = []
    for info in registry.backends().values():
        row: dict[str, Any] = {"backend": info.name, "aliases": list(info.aliases), "available": info.available}
        rows.append({**row, **({} if info.capabilities is None else _plain(info.capabilities))})
    return rows


def _plain(capabilities: Capabilities) -> dict[str, Any]:
    return {
        "devices": sorted(capabilities.devices),
        "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in capabilities.dtypes),
        "patterns": sorted(pattern.__name__ for pattern in capabilities.patterns),
        "segments": "any" if capabilities.segments >= 1 << 16 else str(capabilities.segments),
        "bias": sorted(capabilities.bias),
        **{flag: getattr(capabilities, flag) for flag in _FLAGS},
    }


def markdown() -> str:
    """The matrix as a Markdown table, one column per backend."""
    rows = matrix()
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("backend", "available")))
    lines = ["| | " + " | ".join(f"`{row['backend']}`" for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    lines += [f"| {key} | " + " | ".join(cell(row.get(key)) for row in rows) + " |" for key in keys]
    return "\n".join(lines)


def cell(value: object) -> str:
    """A value of the matrix in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
