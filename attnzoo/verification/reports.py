"""The results of ``verify``: a report on one passage of text, and a collection of reports on several passages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from attnzoo.conformance.attention_check import AttentionReport
from attnzoo.conformance.error_rule import Check


@dataclass(frozen=True)
class Report:
    """The result of :func:`verify`. It prints as a table with one row per site.

    Attributes:
        backend: name of the verified backend.
        sites: comparisons of each attention of the patched model with the float64 oracle on equal inputs.
        end_to_end: comparisons of the patched model's outputs and parameter gradient with the reference. The reference
            is the whole model with the oracle in float64.
        original: comparisons of the model's own code with the reference. A failed check here means that the
            adapter does not compute what the model's own code computes.
        original_sites: comparisons of each attention module's own code with the float64 oracle on equal inputs.
        fault: the reason why the model's own code is wrong and was not run. Empty if the code is right.
        note: which tokens and comparisons were left out, and which comparisons did not use the model's dtype. Empty if
            there are none.
        changed: how the backend and the reference change the pattern. Empty if the pattern is unchanged.
        distance: for each output, the largest difference between the model's own code and the reference, divided by
            the largest value of the reference. Empty if the pattern is unchanged.
    """

    backend: str
    sites: tuple[AttentionReport, ...]
    end_to_end: tuple[Check, ...]
    original: tuple[Check, ...]
    original_sites: tuple[AttentionReport, ...] = ()
    fault: str = ""
    note: str = ""
    changed: str = ""
    distance: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every error is within its budget, and at least one site and one output were compared."""
        checks = (*self.end_to_end, *self.original)
        sites = (*self.sites, *self.original_sites)
        compared = bool(self.sites and self.end_to_end) and all(site.checks for site in sites)
        return compared and all(site.ok for site in sites) and all(check.ok for check in checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: every check with its error, budget and verdict."""
        return {
            "backend": self.backend,
            "ok": self.ok,
            **asdict(self),
            "sites": _plain_sites(self.sites),
            "end_to_end": _plain_checks(self.end_to_end),
            "original": _plain_checks(self.original),
            "original_sites": _plain_sites(self.original_sites),
        }

    def __str__(self) -> str:
        from attnzoo.verification.report_text import text

        return text([self])


@dataclass(frozen=True)
class Passages:
    """Reports on one or more passages. They print as one table with the largest error of each site."""

    reports: tuple[Report, ...]

    @property
    def ok(self) -> bool:
        """Whether there is a report, and the reports on all passages are ok."""
        return bool(self.reports) and all(report.ok for report in self.reports)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with every report in full."""
        reports = [report.to_dict() for report in self.reports]
        return {"backend": self.reports[0].backend, "ok": self.ok, "passages": reports}

    def __str__(self) -> str:
        from attnzoo.verification.report_text import text

        return text(self.reports)


def _plain_sites(sites: Iterable[AttentionReport]) -> list[dict[str, Any]]:
    return [{**asdict(site), "ok": site.ok, "checks": _plain_checks(site.checks)} for site in sites]


def _plain_checks(checks: Iterable[Check]) -> list[dict[str, Any]]:
    return [{**asdict(check), "ok": check.ok} for check in checks]
