"""The counted works as JSON, from which predictions and their tables are made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from attnzoo.benchmarks.gpu.prediction.work import Work

FILE = "gpu_prediction.json"  # in benchmarks/results


class Count(NamedTuple):
    """What one call of a module starts on the device.

    Attributes:
        backend: the backend, or ``"native"`` for the model's code without a patch.
        train: whether the call has a backward.
        works: the distinct works, each with the number of its launches.
    """

    family: str
    seq_len: int
    backend: str
    train: bool
    works: tuple[tuple[Work, int], ...]

    @property
    def launches(self) -> int:
        """The number of launches."""
        return sum(calls for _, calls in self.works)

    @property
    def flops(self) -> int:
        """FLOPs of matrix products."""
        return sum(work.flops * calls for work, calls in self.works)

    @property
    def bytes(self) -> int:
        """Bytes that all launches read and write."""
        return sum(work.bytes * calls for work, calls in self.works)


def write(counts: Iterable[Count], versions: dict[str, str], path: Path) -> None:
    """Write counts to a JSON file."""
    lines = (json.dumps({**count._asdict(), "works": [[*w, n] for w, n in count.works]}) for count in counts)
    path.write_text(f'{{"versions": {json.dumps(versions)}, "counts": [\n' + ",\n".join(lines) + "\n]}\n")


def read(path: Path) -> tuple[list[Count], dict[str, str]]:
    """Return the counts in a JSON file, and the versions of the packages with which they were counted."""
    content = json.loads(path.read_text())
    counts = [
        Count(**{**entry, "works": tuple((Work(*work[:-1]), work[-1]) for work in entry["works"])})
        for entry in content["counts"]
    ]
    return counts, content["versions"]
