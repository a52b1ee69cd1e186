"""``explain``: list the backends that would run at each attention module of a model, without patching the model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError, Refusal
from attnzoo.layout import fit, group_by, heading
from attnzoo.patching.plan import BUILT_IN, SitePlan, plan_sites
from attnzoo.patching.sites import PatchTarget, find_sites
from attnzoo.registry import registry
from attnzoo.reporting.outlook import outlook
from attnzoo.spec.segments import Request


@dataclass(frozen=True)
class Verdict:
    """Whether a backend would run at a site.

    Attributes:
        site: name of the attention module.
        cls: name of the module's class.
        pattern: description of the module's attention pattern.
        backend: name of the backend.
        refusals: every reason why the backend would not run. Empty means that the backend would run.
        changes: descriptions of how the backend would change the pattern. Empty means that the backend is exact here.
    """

    site: str
    cls: str
    pattern: str
    backend: str
    refusals: tuple[Refusal, ...]
    changes: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether the backend would run at the site."""
        return not self.refusals


class Explanation(tuple[Verdict, ...]):
    """The verdicts for all sites, which print as text. Sites with equal verdicts are printed together.

    Attributes:
        auto: for each site name, lines of text. Each line says what ``auto`` selects for which sizes, and why.
    """

    auto: dict[str, tuple[str, ...]]

    def __new__(cls, verdicts: Iterable[Verdict], auto: dict[str, tuple[str, ...]] | None = None) -> Explanation:
        explanation = super().__new__(cls, verdicts)
        explanation.auto = {} if auto is None else auto
        return explanation

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"verdicts": [{**asdict(verdict), "runs": verdict.runs} for verdict in self], "auto": self.auto}

    def __str__(self) -> str:
        lines = []
        for sites in group_by(group_by(self, lambda verdict: verdict.site), self._content):
            first = sites[0][0]
            lines.append(heading([verdicts[0].site for verdicts in sites], first.cls, first.pattern))
            for verdict in sites[0]:
                runs = f"runs, approximate: {'; '.join(verdict.changes)}" if verdict.changes else "runs"
                lines.append(f"  {verdict.backend}: {runs if verdict.runs else 'refuses'}")
                lines.extend(f"    {reason}" for reason in verdict.refusals)
            lines.extend(f"  auto: {line}" for line in self.auto.get(first.site, ()))
        return fit("\n".join(lines))

    def _content(self, verdicts: list[Verdict]) -> Hashable:
        """Return all that is printed about one site, except its name. ``verdicts`` are the verdicts for this site."""
        first = verdicts[0]
        printed = tuple((verdict.backend, verdict.refusals, verdict.changes) for verdict in verdicts)
        return first.cls, first.pattern, printed, self.auto.get(first.site, ())


def explain(model: nn.Module, backend: str | Backend | None = None, **options: Any) -> Explanation:
    """Return whether each backend would run at each attention module of a model, and the reasons for each refusal.

    Args:
        model: a model of a family with an adapter. The answer depends on the model's mode, device and dtype.
        backend: name of a backend, or a configured backend (see :func:`attnzoo.configure`). None and ``"auto"`` mean
            all registered backends. The result then also contains what ``auto`` selects.
        options: options of the named backend.

    Returns:
        An :class:`Explanation`: a tuple of :class:`Verdict` that prints as text. The model is neither changed nor run.

    Raises:
        InvalidArgumentError, UnknownNameError: an argument is invalid.
        PatchError: no adapter finds an attention module in the model.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=9)
        >>> print(explain(GPTNeoXModel(GPTNeoXConfig(**sizes)), "eager"))
        layers.0.attention (GPTNeoXAttention, causal)
          eager: runs
    """
    backend = None if backend == "auto" else backend
    if options and (not isinstance(backend, str) or backend in BUILT_IN):
        given = "without a backend" if backend is None else f"with backend {backend}"
        raise InvalidArgumentError(
            "options",
            f"{sorted(options)} {given}",
            "no options, unless the backend is given by its name and is not 'auto' or 'native'",
        )
    targets = find_sites(model)
    verdicts = []
    for name, configured in _configure(backend, options).items():
        plans = _plan(model, targets, configured)
        verdicts += [_verdict(name, plan, plans) for plan in plans if plan.target.point.attends]
    auto = {}
    if backend is None:
        plans = _plan(model, targets, BUILT_IN["auto"])
        auto = {plan.target.name: outlook(plan) for plan in plans if plan.target.point.attends and not plan.obstacle}
    by_site = group_by(verdicts, lambda verdict: verdict.site)
    return Explanation([verdict for group in by_site for verdict in group], auto)


def _plan(model: nn.Module, targets: Sequence[PatchTarget], backend: Backend) -> tuple[SitePlan, ...]:
    return plan_sites(model, targets, {target: backend for target in targets if target.point.attends})


def _verdict(name: str, plan: SitePlan, plans: Sequence[SitePlan]) -> Verdict:
    """Return the verdict on a site. An obstacle (such as drift) in a companion of the site counts as a refusal."""
    target = plan.target
    obstacles = tuple(
        Refusal("adapter", str(other.obstacle), "a module that the adapter can patch")
        for other in plans
        if other.obstacle is not None
        and (other is plan or (not other.target.point.attends and target.module in other.target.covered_modules()))
    )
    pattern = target.point.describe(target.module)
    return Verdict(target.name, target.cls.__name__, pattern, name, obstacles + plan.refusals, plan.changes)


@dataclass(frozen=True)
class _Unusable(Backend):
    """Placeholder for a backend that failed to load or needs options. It refuses every request with ``reason``."""

    reason: Refusal

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        return (self.reason,)


def _configure(backend: str | Backend | None, options: Mapping[str, Any]) -> dict[str, Backend]:
    if isinstance(backend, Backend):
        return {backend.name: backend}
    if backend is None:
        return {name: _configure_named(name, options) for name in registry.backends()}
    if backend in BUILT_IN:
        return {backend: BUILT_IN[backend]}
    if backend in registry.variants():
        return {backend: registry.configure(backend, **options)}
    name = registry.backend_class(backend).name
    return {name: _configure_named(name, options)}


def _configure_named(name: str, options: Mapping[str, Any]) -> Backend:
    info = registry.backends()[name]
    if info.capabilities is None:
        return _Unusable(Refusal("availability", info.reason, "a machine that can load the backend"))
    missing = [option for option in registry.backend_class(name).required_options() if option not in options]
    if missing:
        return _Unusable(Refusal("options", f"no value for {', '.join(missing)}", f"values, e.g. {missing[0]}=..."))
    return registry.configure(name, **options)
