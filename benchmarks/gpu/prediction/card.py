"""From counted works to predicted seconds: data sheets of cards, and the assumptions of the prediction."""

from __future__ import annotations

from typing import NamedTuple

from attnzoo.benchmarks.gpu.prediction.stored import Count
from attnzoo.benchmarks.gpu.prediction.work import Work


class Card(NamedTuple):
    """The numbers of a data sheet of NVIDIA.

    Attributes:
        flops: FLOPs per second in bfloat16 on tensor cores, without sparsity.
        bandwidth: bytes per second between chip and memory.
    """

    name: str
    flops: float
    bandwidth: float


H100 = Card("H100", 989e12, 3.35e12)  # SXM
H200 = Card("H200", 989e12, 4.8e12)
CARDS = (H100, H200)

# Assumptions. They are round numbers, and not fitted to the measured times in goals.py.
PRODUCTS = 0.6  # the share of the peak that matrix products and fused attention of PyTorch reach
TRITON = 0.33  # the same of Triton kernels; a sketch of the forward reached 325 TFLOP/s on an H200
BANDWIDTH = 0.75  # the share of the bandwidth that every kernel reaches
SHORTEST = 2e-6  # seconds that the shortest kernel occupies the device
HOST = 8e-6  # seconds that the host needs for an operator of PyTorch, with the Python around the operator
HOST_TRITON = 50e-6  # the same for a launch of Triton, which has up to a hundred arguments


def device_seconds(work: Work, card: Card) -> float:
    """Return the predicted seconds of one launch on the device: the slowest of FLOPs, bytes and an empty kernel."""
    share = TRITON if work.is_triton else PRODUCTS
    return max(work.flops / (share * card.flops), work.bytes / (BANDWIDTH * card.bandwidth), SHORTEST)


def host_seconds(count: Count) -> float:
    """Return the predicted seconds in which the host starts all launches of a call."""
    return sum((HOST_TRITON if work.is_triton else HOST) * calls for work, calls in count.works)


def by_operator(count: Count, card: Card) -> list[tuple[str, float]]:
    """Return the predicted device seconds of each operator of a call, the slowest operator first."""
    total: dict[str, float] = {}
    for work, calls in count.works:
        total[work.name] = total.get(work.name, 0.0) + device_seconds(work, card) * calls
    return sorted(total.items(), key=lambda item: -item[1])


def seconds(count: Count, card: Card) -> float:
    """Return the predicted seconds of a call. Host and device work at the same time, so the slower one decides."""
    return max(sum(of_operator for _, of_operator in by_operator(count, card)), host_seconds(count))
