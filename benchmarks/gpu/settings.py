"""The settings that all items of an agenda share, and the backends to measure with these settings."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from attnzoo.benchmarks.cases import AUTO
from attnzoo.benchmarks.models import WORKLOADS, find_workload
from attnzoo.registry import registry


def load_models(families: Iterable[str]) -> None:
    """Import the code of the families, and exclude all loaded objects from garbage collection.

    Call this after the backends are imported. Garbage is collected before every timed run. With the modules that
    transformers and PyTorch load for a model, a collection takes a quarter of a second. Together, collections took more
    than half of the CPU time of an item.
    """
    for family in families:
        import_module(find_workload(family).model_class.partition(":")[0])
    gc.freeze()


@dataclass(frozen=True)
class Settings:
    """Where the items run, and how large they are.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        tiny: whether models and inputs are so small that all items together take about a minute on a CPU. Such a run
            tests the benchmark and measures nothing.
    """

    device: str = "cuda"
    tiny: bool = False

    @property
    def dtype(self) -> str:
        """The dtype of models that are timed. A CPU without bfloat16 instructions would be slow in bfloat16."""
        return "bfloat16" if self.device == "cuda" else "float32"

    def prepare(self) -> None:
        """Reduce the workloads of this process if the settings are tiny."""
        if self.tiny:
            WORKLOADS.update({name: workload.reduced() for name, workload in WORKLOADS.items()})

    def backends(self) -> tuple[str, ...]:
        """Return the exact backends that can run here and store no dense scores, highest priority first, and ``auto``.

        In a tiny run, backends that compile are left out, because a compilation takes longer than all other work.
        """
        classes = [registry.backend_class(info.name) for info in registry.backends().values() if info.available]
        chosen = [
            cls for cls in classes if cls.capabilities.exact and not cls.dense and not (self.tiny and cls.compiles)
        ]
        return (*(cls.name for cls in sorted(chosen, key=lambda cls: -cls.priority)), AUTO)

    def plan(self, **fields: Any) -> dict[str, Any]:
        """Return the fields of a :class:`~attnzoo.benchmarks.runner.ShootoutPlan` with these settings."""
        common = dict(
            dtype=self.dtype, device=self.device, threads=1, backends=self.backends(), rounds=1 if self.tiny else 7,
            verify_len=None, layers=None,
        )  # fmt: skip
        return {**common, **fields}
