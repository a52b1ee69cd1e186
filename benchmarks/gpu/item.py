"""Run one item of the agenda in this process: ``python -m attnzoo.benchmarks.gpu.item NAME FILE DEVICE [tiny]``.

:mod:`attnzoo.benchmarks.gpu.session` starts these processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo.benchmarks.gpu.agenda import agenda
from attnzoo.benchmarks.gpu.results import write
from attnzoo.benchmarks.gpu.settings import Settings
from attnzoo.errors import UnknownNameError


def arguments(name: str, path: Path, settings: Settings) -> list[str]:
    """Return the command that runs an item and writes its results to ``path``."""
    tiny = ["tiny"] if settings.tiny else []
    return [sys.executable, "-m", "attnzoo.benchmarks.gpu.item", name, str(path), settings.device, *tiny]


def main(argv: Sequence[str]) -> None:
    """Run the item that the arguments name."""
    name, path, device, *tiny = argv
    settings = Settings(device, tiny=tiny == ["tiny"])
    items = {item.name: item for item in agenda(settings)}
    if name not in items:
        raise UnknownNameError("item", name, items)
    settings.prepare()
    items[name].run(settings, lambda results: write(Path(path), results))


if __name__ == "__main__":
    main(sys.argv[1:])
