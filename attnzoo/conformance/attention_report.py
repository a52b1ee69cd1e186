"""The result of comparing one attention with the oracle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnzoo.conformance.error_rule import Check


@dataclass(frozen=True)
class AttentionReport:
    """How one attention of one site compares with the float64 oracle on the same inputs.

    Attributes:
        name: the site.
        kernel: what really ran in the model.
        checks: the output, and the gradient with respect to queries, keys and values (and trained biases) together.
        recall: where the backend changes the pattern, the share of the unchanged attention's weight that lies on the
            keys still seen, mean over the judged rows and heads; else None.
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
        """The check that comes closest to its budget, or exceeds it most."""
        return worst(self.checks)


def worst(checks: Iterable[Check]) -> Check:
    """The check with the largest error for its budget."""
    return max(checks, key=lambda check: (not check.ok, check.share))
