"""The contender ``counting``: the original model with the patch ``native``, which only counts calls."""

from __future__ import annotations

from dataclasses import dataclass

import attnzoo
from attnzoo.benchmarks.cases import HOST_SCOPES, Case, Subject, build
from attnzoo.benchmarks.contenders import (
    Contender,
    Execution,
    PreparedContender,
    kernel_counts,
    sites_in_every_step,
)
from attnzoo.benchmarks.rows import ORIGINAL
from attnzoo.patching.patch import Handle


@dataclass(frozen=True)
class Counting(Contender):
    """The original model with the patch ``native``. Its time above the original's is the cost of the patch itself."""

    name: str = "counting"

    def has_row(self, case: Case) -> bool:
        return case.scope in HOST_SCOPES

    def prepare(self, case: Case) -> PreparedContender:
        subject = build(case)
        handle = attnzoo.patch(subject.model, {subject.patched: ORIGINAL})
        subject.release()
        return _PreparedCounting(subject, handle)


class _PreparedCounting(PreparedContender):
    """A subject with the patch ``native``. The model's code computes its numbers, so no gate checks them."""

    def __init__(self, subject: Subject, handle: Handle) -> None:
        super().__init__(subject)
        self._handle = handle

    def execution(self) -> Execution:
        before = kernel_counts(self._handle)
        self.subject.forward()
        ran = kernel_counts(self._handle) - before
        others = sorted({kernel for _, kernel in ran} - {ORIGINAL})
        complaint = f"requested the model's code, but {', '.join(others)} ran" if others else ""
        return Execution("original", complaint if ran else "no attention ran", sites_in_every_step(self.subject, ran))
