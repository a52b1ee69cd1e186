"""What would run where, and why not: per attention module and backend, before anything is patched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnzoo import registry
from attnzoo.errors import DriftError, PatchError, Refusal
from attnzoo.functional import refusals
from attnzoo.patching import check_forward
from attnzoo.sites import expected_requests, find_sites
from attnzoo.tuning.outlook import auto_at


@dataclass(frozen=True)
class Verdict:
    """Whether one backend would run at one site.

    Attributes:
        site: the module's name.
        cls: its class.
        pattern: what it computes, for people.
        backend: the backend's name.
        refusals: every reason why it would not; empty means it runs.
    """

    site: str
    cls: str
    pattern: str
    backend: str
    refusals: tuple[Refusal, ...]

    @property
    def runs(self) -> bool:
        """Whether the backend would run here."""
        return not self.refusals


class Explanation(tuple[Verdict, ...]):
    """All verdicts. Prints sites with equal verdicts together.

    Attributes:
        auto: by site, what ``auto`` takes and why: where it was measured by size, and elsewhere.
    """

    auto: dict[str, tuple[str, ...]]

    def __new__(cls, verdicts: Iterable[Verdict], auto: dict[str, tuple[str, ...]] | None = None) -> Explanation:
        made = super().__new__(cls, verdicts)
        made.auto = {} if auto is None else auto
        return made

    def __str__(self) -> str:
        groups: dict[tuple[tuple[Any, ...], ...], list[str]] = {}
        for site in dict.fromkeys(verdict.site for verdict in self):
            own = [verdict for verdict in self if verdict.site == site]
            told = [(verdict.backend, verdict.refusals) for verdict in own]
            groups.setdefault(((own[0].cls, own[0].pattern), (*told,), self.auto.get(site, ())), []).append(site)
        lines = []
        for ((cls, pattern), verdicts, auto), sites in groups.items():
            more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
            lines.append(f"{sites[0]}{more} ({cls}, {pattern})")
            for backend, reasons in verdicts:
                lines.append(f"  {backend}: {'runs' if not reasons else 'refuses'}")
                lines.extend(f"    {reason}" for reason in reasons)
            lines.extend(f"  auto: {line}" for line in auto)
        return "\n".join(lines)


def explain(model: nn.Module, backend: str | None = None) -> Explanation:
    """What each backend would do at each attention module of a model as it is now (train or eval, device, dtype).

    Args:
        model: a model of a family with an adapter.
        backend: one backend's name; None: all registered ones, and what ``auto`` takes.

    Returns:
        An :class:`Explanation`: a tuple of :class:`Verdict` that prints as text. Nothing is changed or run.

    Raises:
        UnknownNameError: no such backend. PatchError: no adapter finds anything in the model.
    """
    infos = registry.backends()
    names = list(infos) if backend is None else [registry.backend_class(backend).name]
    verdicts = []
    auto: dict[str, tuple[str, ...]] = {}
    for found in (found for found in find_sites(model) if found.seam.attends):
        common: tuple[Refusal, ...] = ()
        try:
            found.adapter.check_drift(found.seam, found.module)
            check_forward(found)
            found.seam.check(found.module)
        except (DriftError, PatchError) as error:
            common = (Refusal("adapter", str(error), "what the adapter was verified against"),)
        for name in names:
            reasons = common
            if not infos[name].available:
                reasons += (Refusal("availability", infos[name].reason, "a machine that has it"),)
            elif missing := registry.backend_class(name).required_options():
                reasons += (Refusal("options", f"no {', '.join(missing)}", f"{missing[0]}=..."),)
            else:
                made = registry.make_backend(name)
                for request in expected_requests(found):
                    reasons += refusals(made, request)
            pattern = found.seam.describe(found.module)
            verdict = Verdict(found.name, type(found.module).__name__, pattern, name, tuple(dict.fromkeys(reasons)))
            verdicts.append(verdict)
        if backend is None and not common:
            auto[found.name] = auto_at(found)
    return Explanation(verdicts, auto)
