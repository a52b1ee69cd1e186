"""The results of ``verify``: a report for one passage, and a collection for several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from attnzoo.conformance.attention_check import AttentionReport
from attnzoo.conformance.error_rule import Check


@dataclass(frozen=True)
class Report:
    """The result of :func:`verify`. Prints as a table with one row per site; :meth:`to_dict` gives plain data.

    Attributes:
        backend: the verified backend.
        sites: each attention of the patched model compared with the float64 oracle, on the inputs that it got.
        end_to_end: outputs and parameter gradient on real tokens, compared with the model with the oracle in float64.
        original: the model's own code compared with the same reference. It shows that the adapter is right.
        original_sites: each attention module's own code compared with the oracle, on the inputs that it got.
        fault: why the model's own code is wrong, so that it was not run; empty if it is right.
        note: what was not compared, and why; empty if everything was.
        changed: how the backend changes the pattern; the reference has the same change. Empty: no change.
        distance: if the pattern was changed, the effect on each output: the largest difference between the model's own
            code and the reference, divided by the reference's largest value.
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
        return bool(self.sites and checks) and all(site.ok for site in sites) and all(check.ok for check in checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every check with its error, budget and verdict."""
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
    """Reports on several passages, at least one. Prints as one table with the worst passage of each site."""

    reports: tuple[Report, ...]

    @property
    def ok(self) -> bool:
        """Whether every passage is within the error rule."""
        return all(report.ok for report in self.reports)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every report in full."""
        reports = [report.to_dict() for report in self.reports]
        return {"backend": self.reports[0].backend, "ok": self.ok, "passages": reports}

    def __str__(self) -> str:
        from attnzoo.verification.report_text import text

        return text(self.reports)


def _plain_sites(sites: Iterable[AttentionReport]) -> list[dict[str, Any]]:
    return [{**asdict(site), "ok": site.ok, "checks": _plain_checks(site.checks)} for site in sites]


def _plain_checks(checks: Iterable[Check]) -> list[dict[str, Any]]:
    return [{**asdict(check), "ok": check.ok} for check in checks]
