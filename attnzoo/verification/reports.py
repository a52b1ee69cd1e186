"""Results of `verify`: of one model on one passage, and on several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from attnzoo.conformance.attention_report import AttentionReport
from attnzoo.conformance.error_rule import Check


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found. Prints as a table, each site once; :meth:`to_dict` for JSON.

    Attributes:
        backend: the backend verified.
        sites: per attention, against the float64 oracle on the inputs the model gave it.
        end_to_end: outputs and parameter gradients on real tokens, against the model with the oracle in float64.
        original: the model's own code against the same: it says that the oracle computes what the model means.
        original_sites: each attention module's own code against the module with the oracle, on the same inputs.
        fault: why the model's own code is wrong, and so was not run; empty where it is right.
        note: what was not compared, and why; empty where everything was.
        changed: what the backend changed of the pattern; everything is judged with that change then. Empty: nothing.
        distance: what it makes of the model: per output, the largest difference between the model's own code and the
            reference, over the reference's largest value. Empty where nothing was changed.
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
        """Whether everything is within its error budget, and something was checked."""
        checks = (*self.end_to_end, *self.original)
        sites = (*self.sites, *self.original_sites)
        return bool(self.sites and checks) and all(site.ok for site in sites) and all(check.ok for check in checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every check with its error, budget and verdict."""
        return {
            "backend": self.backend,
            "ok": self.ok,
            "sites": [_plain_site(site) for site in self.sites],
            "end_to_end": [_plain(check) for check in self.end_to_end],
            "original": [_plain(check) for check in self.original],
            "original_sites": [_plain_site(site) for site in self.original_sites],
            "fault": self.fault,
            "note": self.note,
            "changed": self.changed,
            "distance": dict(self.distance),
        }

    def __str__(self) -> str:
        from attnzoo.verification.report_text import text

        return text([self])


@dataclass(frozen=True)
class Passages:
    """Reports on several inputs of one model. Prints as one table, of the worst passage at each site.

    Attributes:
        reports: one per passage, of which there is one at least.
    """

    reports: tuple[Report, ...]

    @property
    def ok(self) -> bool:
        """Whether every passage is within the error rule."""
        return all(report.ok for report in self.reports)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every report whole."""
        reports = [report.to_dict() for report in self.reports]
        return {"backend": self.reports[0].backend, "ok": self.ok, "passages": reports}

    def __str__(self) -> str:
        from attnzoo.verification.report_text import text

        return text(self.reports)


def _plain_site(site: AttentionReport) -> dict[str, Any]:
    said = {"name": site.name, "kernel": site.kernel, "ok": site.ok, "recall": site.recall}
    return {**said, "checks": [_plain(check) for check in site.checks]}


def _plain(check: Check) -> dict[str, Any]:
    return {**asdict(check), "ok": check.ok}
