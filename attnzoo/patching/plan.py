"""The decision whether a backend may serve a site, made in one place: a :class:`SitePlan` per site.

``patch`` raises from the plans or installs them, ``explain`` prints them, and each call of a patched module is checked
by its plan. The support matrix asks :func:`attnzoo.functional.refusals_of`, as the plans do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnzoo.auto.selection import AutoBackend
from attnzoo.backend import Backend
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, PatchError, Refusal, shorten
from attnzoo.functional import alternatives_to, check_requests, refusals_of
from attnzoo.originals import slots
from attnzoo.patching.keywords import check_keywords
from attnzoo.patching.sites import PatchTarget, expected_requests, has_trained_parameters
from attnzoo.spec.segments import Request
from attnzoo.spec.transforms import transforms_around


@dataclass(frozen=True)
class NativeBackend(Backend):
    """The model's own code. It serves every site, and runs inside the module, so it computes no :class:`Attention`."""

    name: ClassVar[str] = "native"

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        return ()


# Backends that every model has, under the names that the registry reserves.
BUILT_IN: Mapping[str, Backend] = {backend.name: backend for backend in (AutoBackend(), NativeBackend())}


@dataclass(frozen=True, eq=False)
class SitePlan:
    """Whether a backend may serve a site, how, and if not, why.

    Attributes:
        target: the module.
        backend: the backend, bound to the site.
        requests: what the module is expected to request, for the model as it is now.
        refusals: every reason why the backend refuses these requests.
        alternatives: names of the backends that support all of them; None where that is not known or not needed.
        changes: how the backend changes the pattern of what it does not refuse, as text; empty where it is exact.
        obstacle: why no backend can be patched in at the site (drift, for example); None if there is no such reason.
    """

    target: PatchTarget
    backend: Backend
    requests: tuple[Request, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    alternatives: tuple[str, ...] | None = None
    changes: tuple[str, ...] = ()
    obstacle: PatchError | None = None

    @property
    def is_native(self) -> bool:
        """Whether the site runs the model's own code."""
        return isinstance(self.backend, NativeBackend)

    def check_call(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], sharers: Sequence[nn.Module]
    ) -> None:
        """Raise before the module does anything if the backend would refuse what a call is expected to request.

        The module is the target's, or a copy of it; ``sharers`` are the modules that share values with it, if any do.

        Raises:
            BackendRefusedError: lists every reason.
            KeywordRefusedError: a keyword argument changes the result, and no backend computes with it.
        """
        point = self.target.point
        if not point.attends:
            return
        check_keywords(module, kwargs)
        if isinstance(self.backend, AutoBackend):
            return  # it checks each attention when it selects; a check here would take 20 us per layer and call
        inputs = (*args, *kwargs.values())
        grad = torch.is_grad_enabled() and (
            has_trained_parameters(module) or any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        )
        probabilities, transforms = point.wants_probabilities(module, kwargs), transforms_around(inputs)
        requests = expected_requests(point, module, sharers or (module,), grad, probabilities, transforms)
        if requests:
            check_requests(self.backend, requests, self.target.label, "before the call")


def plan_sites(
    model: nn.Module, targets: Sequence[PatchTarget], backends: Mapping[PatchTarget, Backend]
) -> tuple[SitePlan, ...]:
    """Plan a patch: its sites, and their companions (modules that attend nothing and are patched with the sites).

    ``targets`` are all patch targets of the model. The plans of the sites come first.

    Raises:
        InvalidArgumentError: options of a backend have no effect at any of its sites.
    """
    obstacles: dict[PatchTarget, PatchError | None] = {}
    requests: dict[PatchTarget, tuple[Request, ...]] = {}
    for target, backend in backends.items():
        native = isinstance(backend, NativeBackend)
        obstacles[target] = None if native else _find_obstacle(model, target)
        requests[target] = () if native or obstacles[target] else target.expected_requests()
    bound: dict[PatchTarget, Backend] = {}
    for backend in dict.fromkeys(backends.values()):
        sites = [target for target, other in backends.items() if other == backend]
        together = tuple(request for target in sites for request in requests[target])
        bound |= {target: backend.bind_to_site(requests[target], together) for target in sites}
        _check_options([bound[target] for target in sites if not obstacles[target]])
    plans = []
    for target in backends:
        backend, expected = bound[target], requests[target]
        refusals = refusals_of(backend, expected)
        alternatives = alternatives_to(backend, expected) if refusals else None
        changes = changes_of(backend, expected)
        plans.append(SitePlan(target, backend, expected, refusals, alternatives, changes, obstacles[target]))
    return (*plans, *_plan_companions(model, targets, plans))


def _plan_companions(model: nn.Module, targets: Sequence[PatchTarget], plans: Sequence[SitePlan]) -> Iterable[SitePlan]:
    backends = {id(plan.target.module): plan.backend for plan in plans if not plan.is_native}
    for target in targets:
        covered = (backends[id(module)] for module in target.covered_modules() if id(module) in backends)
        if not target.point.attends and (backend := next(covered, None)) is not None:
            yield SitePlan(target, backend, obstacle=_find_obstacle(model, target))


def changes_of(backend: Backend, requests: Sequence[Request], anywhere: bool = False) -> tuple[str, ...]:
    """Return how a backend, bound to its site, changes the pattern of the requests that it does not refuse, as text.

    ``anywhere`` ignores refusals that only this machine has.
    """
    supported = (request for request in requests if not refusals_of(backend, (request,), anywhere))
    return tuple(dict.fromkeys(change for request in supported if (change := backend.changes(request)) is not None))


def check_plans(plans: Sequence[SitePlan], allow_refusals: bool = False) -> None:
    """Raise the error that prevents a patch, if there is one.

    Raises:
        PatchError: the first obstacle.
        BackendRefusedError: lists every site with a refusal, unless refusals are allowed.
    """
    for plan in plans:
        if plan.obstacle is not None:
            raise plan.obstacle
    refused = [] if allow_refusals else [plan for plan in plans if plan.refusals]
    if refused:
        names = ", ".join(dict.fromkeys(plan.backend.name for plan in refused))
        refusals = {plan.target.label: plan.refusals for plan in refused}
        alternatives = {plan.target.label: plan.alternatives for plan in refused if plan.alternatives is not None}
        raise BackendRefusedError(names, refusals, alternatives, stage="patch")


def _check_options(backends: Sequence[Backend]) -> None:
    """Raise if a backend has options that have no effect at any site; it is given once per site, bound to that site."""
    unused = [backend.unused_options() for backend in backends]
    if unused and all(unused):
        allowed = "no options: every attention in this patch is already local, so they would have no effect"
        raise InvalidArgumentError(f"options of backend {backends[0].name!r}", ", ".join(unused[0]), allowed)


def _find_obstacle(model: nn.Module, target: PatchTarget) -> PatchError | None:
    """Return why nothing can be patched in at a target: drift, a replaced forward, a configuration, no weights."""
    try:
        target.adapter.check_drift(target.point, target.module)
        _check_forward(target)
        target.point.check(target.module)
        _check_loaded(model, target)
    except PatchError as error:
        return error.with_traceback(None)  # the frames would keep the model alive
    return None


def _check_forward(target: PatchTarget) -> None:
    if slots.is_foreign(target.module):
        forward = shorten(repr(slots.current(target.module)))
        raise PatchError(
            f"{target.name}: got a module whose forward was replaced by {forward}; allowed: the class's "
            "own forward (accelerate's hooks may be around it), or attnzoo's patches"
        )


def _check_loaded(model: nn.Module, target: PatchTarget) -> None:
    """Raise if a parameter is on the meta device and no hook of accelerate moves it to another device."""
    for name, parameter in target.module.named_parameters(prefix=target.name):
        if parameter.is_meta and not _is_offloaded(model, name):
            raise PatchError(
                f"{name}: got a parameter on the meta device, without data; allowed: a model whose weights are "
                "loaded (from_pretrained, or accelerate.load_checkpoint_and_dispatch after init_empty_weights): "
                "load the weights first, then patch"
            )


def _is_offloaded(model: nn.Module, parameter: str) -> bool:
    """Whether a hook on a module around a parameter moves the parameter to a device for each forward."""
    path = parameter.split(".")[:-1]
    around = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1))
    return any(slots.runs_on(module) is not None for module in around)
