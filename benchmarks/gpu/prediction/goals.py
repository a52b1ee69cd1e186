"""The modules to predict, with the speed that attnzoo aims at and what an earlier run has measured."""

from __future__ import annotations

from typing import NamedTuple

SEQ_LEN = 16384
NATIVE = "native"


class Goal(NamedTuple):
    """One module with its published configuration, in bfloat16 with 16384 tokens.

    Attributes:
        family: name of a workload in :data:`~attnzoo.benchmarks.models.WORKLOADS`.
        backend: the backend that attnzoo recommends on CUDA.
        forward, training: the speed to reach, the original divided by the backend. ``training`` is a forward and a
            backward. None means that there is no goal.
        measured: milliseconds of the original on an H200, forward and training (torch 2.11, transformers 5.17, commit
            7021bbf). None means that this configuration was not measured.
    """

    family: str
    backend: str
    forward: float
    training: float | None
    measured: tuple[float, float] | None

    def speed(self, train: bool) -> float | None:
        """Return the speed to reach in a mode."""
        return self.training if train else self.forward


# The original GPT-NeoX was measured with 16 heads of 128, and the published configuration has 12 heads of 64.
GOALS = (
    Goal("led", "triton", 10.0, 10.0, (10.3, 38.5)),
    Goal("longt5_tglobal", "triton", 12.0, 8.0, (11.7, 35.8)),
    Goal("longt5_local", "triton", 6.0, 3.0, (2.8, 6.0)),
    Goal("reformer", "triton", 5.0, 4.0, (9.2, 19.8)),
    Goal("reformer_local", "triton", 2.5, None, (1.26, 3.4)),
    Goal("gpt_neox", "auto", 0.97, 0.97, None),
    Goal("gpt_bigcode", "auto", 0.97, 0.97, (2.2, 8.5)),
)
