"""What the examples share: the shipped checkpoints and text, and the cost of a run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from attnzoo.benchmarks.measure import peak_of

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "benchmarks" / "data" / "moby_dick.txt"
T = TypeVar("T")


def checkpoint(family: str) -> str:
    """Return the folder of a small trained checkpoint. One byte of text is one token."""
    return str(ROOT / "tests" / "checkpoints" / family)


def arguments(description: str, family: str, **defaults: Any) -> argparse.Namespace:
    """Return the command line: ``--model``, and an option for each default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=checkpoint(family), help="a name of the hub, or the folder of a checkpoint")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=" ")
    return parser.parse_args()


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a run, and the bytes that it needed in addition to what was in use before.

    ``peak_bytes`` is None if this system cannot measure the peak of a single run.
    """

    seconds: float
    peak_bytes: int | None


def measure(run: Callable[[], T]) -> tuple[T, Cost]:
    """Run a function, and return its result and its cost."""
    results: list[T] = []
    start = time.process_time()
    peak = peak_of(lambda: results.append(run()), "cpu")
    extra = None if "not resettable" in peak.method else peak.extra
    return results[0], Cost(time.process_time() - start, extra)


def show_gain(original: Cost, patched: Cost, name: str = "attnzoo") -> None:
    """Print both costs and their ratios."""
    for label, cost in (("original", original), (name, patched)):
        memory = "memory unknown" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:7.1f} MiB extra"
        print(f"{label:>14}: {cost.seconds:6.2f} s CPU, {memory}")
    gain = f"{original.seconds / patched.seconds:.2f}x the speed"
    if original.peak_bytes and patched.peak_bytes is not None:
        gain += f", {patched.peak_bytes / original.peak_bytes:.2f}x the memory"
    print(f"{'gain':>14}: {gain}")
