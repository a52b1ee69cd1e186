"""Format reports of ``verify`` as text, with one row for each site and each output of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attnzoo.conformance.attention_check import AttentionReport, worst
from attnzoo.conformance.error_rule import Check
from attnzoo.layout import aligned, fit, group_by
from attnzoo.verification.reports import Report

_HEADER = ("of budget", "original", "kernel", "attention, or output of the model")
_LEGEND = "of budget: the largest error divided by the allowed error; original: this number for the model's own code"
_MISSING = "-"


def text(reports: Sequence[Report]) -> str:
    """Return a table with the worst check of each site, every failed check, the remarks, and the verdict."""
    first = reports[0]
    sites = [site for report in reports for site in report.sites]
    originals = dict(_named(site for report in reports for site in report.original_sites))
    kernels = {name: "+".join(dict.fromkeys(site.kernel for site in group)) for name, group in _by_name(sites).items()}
    rows = [(_share(checks), _share(originals.get(name, [])), kernels[name], name) for name, checks in _named(sites)]
    whole = _by_what(check for report in reports for check in report.end_to_end)
    original = _by_what(check for report in reports for check in report.original)
    rows += [(_share(checks), _share(original.get(what, [])), "", what) for what, checks in whole.items()]
    missing = any(_MISSING in shares for *shares, _, _ in rows)
    lines = [aligned([_HEADER, *rows]), fit(f"{_LEGEND}; {_MISSING}: not compared" if missing else _LEGEND)]
    lines += _failures(reports, sites)
    lines += [fit(line) for line in _remarks(first, sites)]
    return "\n".join([*lines, fit(_verdict(reports))])


def _verdict(reports: Sequence[Report]) -> str:
    name, within = reports[0].backend, sum(report.ok for report in reports)
    if not all(report.sites for report in reports):
        return f"backend {name!r}: NOT shown to be within the error rule: no attention of the model ran"
    many = len(reports) > 1
    if within == len(reports):
        return f"backend {name!r}: within the error rule{f' on all {within} passages' if many else ''}"
    missed = f" on {len(reports) - within} of {len(reports)} passages" if many else ""
    if _is_right(reports):
        own = f"the model's own code: NOT within the error rule{missed} (check the adapter)"
        return f"backend {name!r}: within the error rule; {own}"
    return f"backend {name!r}: NOT within the error rule{missed}"


def _failures(reports: Sequence[Report], sites: Sequence[AttentionReport]) -> list[str]:
    """Return one line for each comparison that fails on at least one passage. The line shows the worst passage."""
    lines = []
    for title, checks in (
        *_named(sites),
        ("model", [check for report in reports for check in report.end_to_end]),
        *((f"original {site}", checks) for site, checks in _named(s for r in reports for s in r.original_sites)),
        ("original model", [check for report in reports for check in report.original]),
    ):
        for group in _by_what(checks).values():
            if not (check := worst(group)).ok:
                lines.append(fit(f"{title}: {check}"))
    return lines


def _remarks(report: Report, sites: Sequence[AttentionReport]) -> list[str]:
    lines = []
    if report.fault:
        lines.append(f"the original was not run: {report.fault}")
    if report.note:
        lines.append(report.note)
    if report.changed:
        lines.append(f"the backend changes the pattern, and the oracle computes the changed pattern: {report.changed}")
    recalls = [site.recall for site in sites if site.recall is not None]
    if recalls:
        mean = sum(recalls) / len(recalls)
        lines.append(f"recall: {mean:.3f} of the unchanged attention's weight is on keys that are still visible")
    for what, distance in report.distance.items():
        lines.append(f"{what} differs from the unchanged model's {what} by {distance:.2g} of the largest value")
    return lines


def _is_right(reports: Sequence[Report]) -> bool:
    """Whether the patched model is within the error rule everywhere. Then only the model's own code may be outside."""
    sites = all(site.ok for report in reports for site in report.sites)
    return sites and all(check.ok for report in reports for check in report.end_to_end)


def _named(sites: Iterable[AttentionReport]) -> list[tuple[str, list[Check]]]:
    return [(name, [check for site in group for check in site.checks]) for name, group in _by_name(sites).items()]


def _by_name(sites: Iterable[AttentionReport]) -> dict[str, list[AttentionReport]]:
    return {group[0].name: group for group in group_by(sites, lambda site: site.name)}


def _by_what(checks: Iterable[Check]) -> dict[str, list[Check]]:
    return {group[0].what: group for group in group_by(checks, lambda check: check.what)}


def _share(checks: Sequence[Check]) -> str:
    if not checks:
        return _MISSING
    check = worst(checks)
    return f"{check.share:.2f}" if check.ok else f"{check.share:.3g} FAILS"
