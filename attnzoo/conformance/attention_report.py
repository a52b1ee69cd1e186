"""The result of comparing one attention with the oracle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnzoo.conformance.error_rule import Check


@dataclass(frozen=True)
class AttentionReport:
    """How one attention compares with the float64 oracle on the same inputs.

    Attributes:
        name: name of the attention; in a model, of its site.
        kernel: the kernel that ran.
        checks: the output; and the gradient with respect to queries, keys, values and trained biases, as one vector.
        recall: for a backend that changes the pattern, the share of the unchanged attention's softmax weight that lies
            on keys that are still visible, mean over the compared rows and heads; else None.
    """

    name: str
    kernel: str
    checks: tuple[Check, ...]
    recall: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def worst(self) -> Check:
        """The check with the largest error relative to its budget."""
        return worst(self.checks)


def worst(checks: Iterable[Check]) -> Check:
    """The check with the largest error relative to its budget."""
    return max(checks, key=lambda check: (not check.ok, check.share))
