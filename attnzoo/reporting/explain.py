"""What would run where, and why not: per attention module and backend, before anything is patched."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError, PatchError, Refusal
from attnzoo.layout import fit, group_by, heading
from attnzoo.patching.patch import check_forward
from attnzoo.patching.sites import check_options, expected_changes, expected_requests, find_sites
from attnzoo.registry import registry
from attnzoo.reporting.outlook import auto_at


@dataclass(frozen=True)
class Verdict:
    """Whether one backend would run at one site.

    Attributes:
        site: the module's name.
        cls: its class.
        pattern: what it computes, for people.
        backend: the backend's name.
        refusals: every reason why it would not; empty means it runs.
        changes: what it would change of the pattern, in words; empty means it is exact here.
    """

    site: str
    cls: str
    pattern: str
    backend: str
    refusals: tuple[Refusal, ...]
    changes: tuple[str, ...] = ()

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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"verdicts": [{**asdict(verdict), "runs": verdict.runs} for verdict in self], "auto": self.auto}

    def __str__(self) -> str:
        lines = []
        for sites in group_by(group_by(self, lambda verdict: verdict.site), self._told):
            first = sites[0][0]
            lines.append(heading([verdicts[0].site for verdicts in sites], first.cls, first.pattern))
            for verdict in sites[0]:
                runs = f"runs, approximate: {'; '.join(verdict.changes)}" if verdict.changes else "runs"
                lines.append(f"  {verdict.backend}: {runs if verdict.runs else 'refuses'}")
                lines.extend(f"    {reason}" for reason in verdict.refusals)
            lines.extend(f"  auto: {line}" for line in self.auto.get(first.site, ()))
        return fit("\n".join(lines))

    def _told(self, verdicts: list[Verdict]) -> Hashable:
        """What is printed of a site, but for its name."""
        first = verdicts[0]
        told = tuple((verdict.backend, verdict.refusals, verdict.changes) for verdict in verdicts)
        return first.cls, first.pattern, told, self.auto.get(first.site, ())


def explain(model: nn.Module, backend: str | Backend | None = None, **options: Any) -> Explanation:
    """What each backend would do at each attention module of a model as it is now (train or eval, device, dtype).

    Args:
        model: a model of a family with an adapter.
        backend: one backend's name, or a configured backend (:func:`attnzoo.configure`); None or ``"auto"``: all
            registered ones, and what ``auto`` takes.
        options: go to the backend that is named.

    Returns:
        An :class:`Explanation`: a tuple of :class:`Verdict` that prints as text. Nothing is changed or run.

    Raises:
        InvalidArgumentError, UnknownNameError: a bad argument. PatchError: no adapter finds anything in the model.
    """
    backend = None if backend == "auto" else backend
    if options and not isinstance(backend, str):
        given = "without a backend" if backend is None else f"with backend {backend}"
        raise InvalidArgumentError("options", f"{sorted(options)} {given}", "options of a named backend")
    everything = [found for found in find_sites(model) if found.point.attends]
    together = tuple(request for found in everything for request in expected_requests(found))
    if isinstance(backend, Backend):
        made: dict[str, Backend | Refusal] = {backend.name: backend}
    elif backend is None:
        made = {name: _make(name, {}) for name in registry.backends()}
    else:
        name = registry.backend_class(backend).name
        made = {name: _make(name, options)}
    for one in made.values():
        if isinstance(one, Backend) and backend is not None:
            check_options(one.bind_to_site(expected_requests(found), together) for found in everything)
    verdicts = []
    auto: dict[str, tuple[str, ...]] = {}
    for found in everything:
        common: tuple[Refusal, ...] = ()
        try:
            found.adapter.check_drift(found.point, found.module)
            check_forward(found)
            found.point.check(found.module)
        except PatchError as error:
            common = (Refusal("adapter", str(error), "what the adapter was verified against"),)
        for name, one in made.items():
            reasons: tuple[Refusal, ...] = common
            changes: tuple[str, ...] = ()
            if isinstance(one, Refusal):
                reasons += (one,)
            else:
                asked = expected_requests(found)
                settled = one.bind_to_site(asked, together)
                reasons += registry.availability(settled)
                for request in asked:
                    reasons += registry.refusals(settled, request)
                changes = expected_changes(settled, asked)
            pattern, cls = found.point.describe(found.module), type(found.module).__name__
            verdicts.append(Verdict(found.name, cls, pattern, name, tuple(dict.fromkeys(reasons)), changes))
        if backend is None and not common:
            auto[found.name] = auto_at(found)
    return Explanation(verdicts, auto)


def _make(name: str, options: Mapping[str, Any]) -> Backend | Refusal:
    """The configured backend of a name; or why it cannot be had, where that is not the options' fault."""
    info = registry.backends()[name]
    if info.capabilities is None:  # it did not load
        return Refusal("availability", info.reason, "a machine that can run it")
    missing = [option for option in registry.backend_class(name).required_options() if option not in options]
    if missing:
        return Refusal("options", f"no {', '.join(missing)}", f"{missing[0]}=...")
    return registry.configure(name, **options)
