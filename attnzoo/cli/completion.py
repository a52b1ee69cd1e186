"""Values that shell completion offers for options. No function here imports torch: a shell waits for the values."""

from __future__ import annotations

from importlib import metadata

from attnzoo.benchmarks.families import FAMILIES

_BUILT_IN = ("auto", "native")


def families(incomplete: str) -> list[str]:
    """Return the models of the benchmarks whose names begin with ``incomplete``."""
    return [name for name in FAMILIES if name.startswith(incomplete)]


def backends(incomplete: str) -> list[str]:
    """Return the backends, by entry point, whose names begin with ``incomplete``."""
    names = {entry.name for entry in metadata.entry_points(group="attnzoo.backends")}
    return sorted(name for name in {*names, *_BUILT_IN} if name.startswith(incomplete))
