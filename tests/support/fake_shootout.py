"""A tiny model family, faulty backends and faulty contenders for the tests of the benchmarks."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import ClassVar

from attnzoo.backends.eager import EagerBackend
from attnzoo.benchmarks.cases import Case
from attnzoo.benchmarks.contenders import Contender, Original, PreparedContender
from attnzoo.benchmarks.models import LED, WORKLOADS
from attnzoo.benchmarks.workload import Workload
from attnzoo.spec.segments import Attention, Result

SMALL = dict(
    vocab_size=300, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, attention_window=[8, 8],
    max_encoder_position_embeddings=128, max_decoder_position_embeddings=64,
)  # fmt: skip
TINY: Workload = replace(
    LED, name="tiny", checkpoint="tiny-led", published={**LED.published, **SMALL}, heads=2, layers=2
)


def add_workload() -> None:
    WORKLOADS["tiny"] = TINY


@dataclass(frozen=True)
class Wrong(EagerBackend):
    """Right shape and kernel, wrong numbers: the scale is wrong."""

    name: ClassVar[str] = "wrong"

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        return super().run(replace(attention, scale=attention.scale * 1.1), probabilities)


@dataclass(frozen=True)
class Elsewhere(EagerBackend):
    """Right numbers, but the reported kernel is the model's own code."""

    name: ClassVar[str] = "elsewhere"

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        return super().run(attention)._replace(kernel="native")


@dataclass(frozen=True)
class Pretending(EagerBackend):
    """Right numbers, but another kernel ran than the reported one."""

    name: ClassVar[str] = "pretending"

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        return super().run(attention)._replace(kernel="flash")


class Switch:
    calls = 0


@dataclass(frozen=True)
class Switching(EagerBackend):
    """The first runs, which are measured, report another kernel than the later runs, which are checked."""

    name: ClassVar[str] = "switching"

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        Switch.calls += 1
        return super().run(attention)._replace(kernel="fast" if Switch.calls < 3 else "slow")


@dataclass(frozen=True)
class ForwardOnly(EagerBackend):
    name: ClassVar[str] = "forward-only"
    capabilities = replace(EagerBackend.capabilities, grad=False)


@dataclass(frozen=True)
class Absent(EagerBackend):
    name: ClassVar[str] = "absent"

    @classmethod
    def unavailable(cls) -> str | None:
        return "needs the package 'nowhere': pip install nowhere"


@dataclass(frozen=True)
class Broken(EagerBackend):
    name: ClassVar[str] = "broken"

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        raise RuntimeError("the kernel fell over")


BACKENDS = (Wrong, Elsewhere, Pretending, Switching, ForwardOnly, Absent, Broken)


@dataclass(frozen=True)
class TinyOriginal(Original):
    """The original, in a process that does not know the tiny family yet."""

    def prepare(self, case: Case) -> PreparedContender:
        add_workload()
        return super().prepare(case)


@dataclass(frozen=True)
class Exiting(Contender):
    """A contender whose process ends without a message."""

    def prepare(self, case: Case) -> PreparedContender:
        os._exit(3)
