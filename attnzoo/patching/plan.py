"""Decide whether a backend may serve a site. The decision for each site is a :class:`SitePlan`.

``patch`` raises the errors in the plans, or patches the sites as planned. ``explain`` prints the plans. The plan of a
patched module checks each call. :func:`attnzoo.functional.refusals_of` makes the refusals of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.auto.native import NativeBackend
from attnzoo.auto.selection import AutoBackend
from attnzoo.backend import Backend
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, KeywordRefusedError, PatchError, Refusal, shorten
from attnzoo.functional import alternatives_to, autocast_dtype, check_requests, refusals_of
from attnzoo.originals import slots
from attnzoo.patching.keywords import check_keywords
from attnzoo.patching.sites import PatchTarget, expected_requests, has_trained_parameters
from attnzoo.registry import registry
from attnzoo.spec.segments import Request
from attnzoo.spec.transforms import transforms_around

_MOST_STATES = 256  # states that a plan keeps; a model has few

# Backends that are always available. The registry reserves their names.
BUILT_IN: Mapping[str, Backend] = {backend.name: backend for backend in (AutoBackend(), NativeBackend())}


@dataclass(frozen=True, eq=False)
class SitePlan:
    """The plan for one site: the backend, the expected requests, and the reasons against a patch.

    Attributes:
        target: the module to patch.
        backend: the backend, bound to the site (:meth:`Backend.bind_to_site`).
        requests: the expected requests of the module, for the model in its current state.
        refusals: every reason why the backend refuses these requests.
        alternatives: names of the backends that support all these requests. None if unknown or not needed.
        changes: descriptions of how the backend changes the pattern of supported requests. Empty for an exact backend.
        obstacle: the error that prevents any patch of the site, such as drift. None if nothing prevents a patch.
    """

    target: PatchTarget
    backend: Backend
    requests: tuple[Request, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    alternatives: tuple[str, ...] | None = None
    changes: tuple[str, ...] = ()
    obstacle: PatchError | None = None
    _supported: set[tuple[object, ...]] = field(default_factory=set, init=False, repr=False)

    @property
    def is_native(self) -> bool:
        """Whether the site runs the model's original code."""
        return isinstance(self.backend, NativeBackend)

    def check_call(
        self,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        sharers: Callable[[], Sequence[nn.Module]],
    ) -> None:
        """Before an attention module runs, raise if the backend refuses a request that this call is expected to make.

        Building a request is too slow for every decoding step. Most of a request follows from the weights and the
        configuration of the module, which stay the same. The rest follows from a state: everything that can change
        between two calls. The plan remembers the states that the backend supports. Only a new state needs a request.

        ``module`` is the target's module or a copy of it. ``sharers`` returns the modules that share a computed value
        with the module, such as a bias (:meth:`SiteAttend.sharers`).

        Raises:
            BackendRefusedError: the backend refuses a request. The error lists every reason.
            KeywordRefusedError: a keyword argument changes the result, and no backend uses it.
        """
        point = self.target.point
        check_keywords(module, kwargs, point.cache)
        if isinstance(self.backend, AutoBackend):
            return  # `auto` checks each attention when it selects. A check here would take 20 us per layer and call.
        inputs = (*args, *kwargs.values())
        grad = torch.is_grad_enabled() and (
            any(isinstance(value, Tensor) and value.requires_grad for value in inputs) or has_trained_parameters(module)
        )
        probabilities, transforms = point.wants_probabilities(module, kwargs), transforms_around(inputs)
        states = point.states_of(args, kwargs)
        state: tuple[object, ...] | None = None
        if isinstance(states, Tensor):
            # Without autocast, the states have the dtype of the weights, or the module's linear layers raise.
            weights = (states.device, autocast_dtype(states.dtype, states.device.type))
            mode, dropout = point.mode(module), module.training and point.dropout(module)
            trains_bias = grad and any(map(point.trains_bias, sharers() or (module,)))
            state = (*weights, mode, dropout, grad, trains_bias, probabilities, transforms, registry.generation)
            if state in self._supported:
                return
        requests = expected_requests(point, module, sharers() or (module,), grad, probabilities, transforms)
        if requests:
            check_requests(self.backend, requests, self.target.label, "before the call")
        if state is not None:
            if len(self._supported) >= _MOST_STATES:
                self._supported.clear()
            self._supported.add(state)

    def fits_graph(
        self,
        given: Sequence[str],
        wanted: bool | None,
        grad: bool,
        exporting: bool,
        sharers: Callable[[], Sequence[nn.Module]],
    ) -> bool:
        """Whether a graph of a compiler may contain a call: the backend supports all that the call may request.

        Args:
            given: the names of the keyword arguments.
            wanted: the argument ``output_attentions``. A graph contains no weights of an attention.
            grad: whether gradients are enabled.
            exporting: whether the graph is exported. It then contains the name of the backend, but no options.
            sharers: as for :meth:`check_call`.
        """
        module, point = self.target.module, self.target.point
        if exporting and self.backend.options():
            return False
        if not point.attends:
            return True
        if point.wants_probabilities(module, {} if wanted is None else {"output_attentions": wanted}):
            return False
        try:
            check_keywords(module, dict.fromkeys(given, True), point.cache)
        except KeywordRefusedError:
            return False
        requests = expected_requests(point, module, sharers() or (module,), grad)
        return not any(registry.refusals(self.backend, _with_dense_masks(request)) for request in requests)


def _with_dense_masks(request: Request) -> Request:
    """Return the request that a graph may make. It passes masks on unread: as a dense mask, and perhaps a bias."""
    segments = (replace(segment, mask=True, bias=segment.bias or "dense") for segment in request.segments)
    return replace(request, segments=tuple(segments))


def plan_sites(
    model: nn.Module,
    targets: Sequence[PatchTarget],
    backends: Mapping[PatchTarget, Backend],
    device: str | None = None,
) -> tuple[SitePlan, ...]:
    """Return the plans of a patch: first the plans of the sites, then the plans of the companions.

    A companion is a module that computes no attention and is patched together with a site. ``targets`` are all patch
    targets of the model. ``backends`` has the requested backend of each site. ``device`` is the type of the device on
    which the model will run, for a model whose weights are not loaded yet or may move. None means that the weights are
    loaded and stay on their device.

    Raises:
        InvalidArgumentError: options of a backend have no effect at any site.
    """
    obstacles: dict[PatchTarget, PatchError | None] = {}
    requests: dict[PatchTarget, tuple[Request, ...]] = {}
    for target, backend in backends.items():
        native = isinstance(backend, NativeBackend)
        obstacles[target] = None if native else _find_obstacle(model, target, device is None)
        expected = () if native or obstacles[target] else target.expected_requests()
        requests[target] = expected if device is None else tuple(replace(each, device=device) for each in expected)
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
    return (*plans, *_plan_companions(model, targets, plans, device is None))


def _plan_companions(
    model: nn.Module, targets: Sequence[PatchTarget], plans: Sequence[SitePlan], loaded: bool
) -> Iterable[SitePlan]:
    backends = {id(plan.target.module): plan.backend for plan in plans if not plan.is_native}
    for target in targets:
        covered = (backends[id(module)] for module in target.covered_modules() if id(module) in backends)
        if not target.point.attends and (backend := next(covered, None)) is not None:
            yield SitePlan(target, backend, obstacle=_find_obstacle(model, target, loaded))


def changes_of(backend: Backend, requests: Sequence[Request], anywhere: bool = False) -> tuple[str, ...]:
    """Return descriptions of how a backend changes the pattern of the requests that it supports.

    ``backend`` must be bound to a site. If ``anywhere`` is True, refusals that depend on the machine are ignored, such
    as a missing package.
    """
    supported = (request for request in requests if not refusals_of(backend, (request,), anywhere))
    return tuple(dict.fromkeys(change for request in supported if (change := backend.changes(request)) is not None))


def check_plans(plans: Sequence[SitePlan], allow_refusals: bool = False) -> None:
    """Raise if a plan has an obstacle or, unless ``allow_refusals`` is True, a refusal.

    Raises:
        PatchError: a plan has an obstacle. The first obstacle is raised.
        BackendRefusedError: a plan has a refusal. The error lists every site with a refusal.
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
    """Raise if options of a backend have no effect at any site. ``backends`` lists the bound backend of each site."""
    unused = [backend.unused_options() for backend in backends]
    if unused and all(unused):
        allowed = "no options, because all attention of this model is already local and options have no effect"
        raise InvalidArgumentError(f"options of backend {backends[0].name!r}", ", ".join(unused[0]), allowed)


def _find_obstacle(model: nn.Module, target: PatchTarget, loaded: bool) -> PatchError | None:
    """Return the error that prevents a patch of a target (drift or, if ``loaded``, missing weights), or None."""
    try:
        target.adapter.check_drift(target.point, target.module)
        _check_forward(target)
        target.point.check(target.module)
        if loaded:
            _check_loaded(model, target)
    except PatchError as error:
        return error.with_traceback(None)  # the frames of a traceback would keep the model in memory
    return None


def _check_forward(target: PatchTarget) -> None:
    forward = slots.foreign(target.module)
    if forward is not None:
        raise PatchError(
            f"{target.name}: got a module whose forward was replaced by {shorten(repr(forward))}; allowed: the forward "
            "of the class, with or without accelerate's hooks, or a patch of attnzoo"
        )


def _check_loaded(model: nn.Module, target: PatchTarget) -> None:
    """Raise if a parameter is on the meta device and no hook of accelerate moves the data to a device."""
    for name, parameter in target.module.named_parameters(prefix=target.name):
        if parameter.is_meta and not _is_offloaded(model, name):
            raise PatchError(
                f"{name}: got a parameter on the meta device, without data; allowed: a parameter with data (before "
                "patch, load the weights with from_pretrained, or with accelerate.load_checkpoint_and_dispatch after "
                "init_empty_weights)"
            )


def _is_offloaded(model: nn.Module, parameter: str) -> bool:
    """Whether a hook of accelerate moves a parameter to a device when a module that contains the parameter runs."""
    path = parameter.split(".")[:-1]
    around = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1))
    return any(slots.runs_on(module) is not None for module in around)
