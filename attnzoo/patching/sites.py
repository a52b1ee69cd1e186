"""Sites: the attention modules of a model that an adapter can take over, what they will ask, and what ran at them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn

from attnzoo.adapter import Adapter, PatchPoint, parameters_of, path_of
from attnzoo.auto.choice import Choice
from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError, PatchError, shorten
from attnzoo.functional import autocast_dtype
from attnzoo.originals import slots
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention, Request, Result

Observer = Callable[["Site", Attention, Result, Backend], None]


@dataclass(eq=False)
class Site:
    """One patched attention module.

    Attributes:
        name: the module's name in the model.
        cls: its class.
        pattern: what it computes, for people.
        backend: the backend that was asked for; ``"native"`` is the model's own code.
        changes: what the backend is expected to change of the pattern, in words; empty where it is exact.
        kernels: how often each kernel really ran.
        calls: how many attentions really ran on the backend.
        choices: how often ``auto`` took each backend, and why; empty for backends asked for by name.
        changed: how often what was really changed.
        fallbacks: how many forwards went to the model's own code under ``fallback="native"``.
        observer: called after every attention with the site, the attention, its result and the backend that ran.
    """

    name: str
    cls: str
    pattern: str
    backend: str
    changes: tuple[str, ...] = ()
    kernels: Counter[str] = field(default_factory=Counter)
    choices: Counter[Choice] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    fallbacks: int = 0
    observer: Observer | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """The name for messages: the class where the module is the model that was patched, which has none."""
        return self.name or self.cls

    @property
    def calls(self) -> int:
        return sum(self.kernels.values())

    @property
    def kernel(self) -> str | None:
        """What really ran so far, most frequent first; None before the first call."""
        return "+".join(kernel for kernel, _ in self.kernels.most_common()) or None

    @property
    def approximate(self) -> str:
        """What was changed of the pattern in the calls so far; before the first, what will be. Empty: nothing."""
        return "; ".join(self.changed if self.calls else self.changes)

    @property
    def ran(self) -> str:
        """The backend asked for, with those that ``auto`` took so far, most frequent first."""
        took = dict.fromkeys(choice.backend.name for choice, _ in self.choices.most_common())
        return f"{self.backend}: {'+'.join(took)}" if took else self.backend


class PatchTarget(NamedTuple):
    """A module that can be patched.

    Attributes:
        owner: the module in which it shares values with others (``PatchPoint.shared_in``), or None.
    """

    name: str
    module: nn.Module
    point: PatchPoint
    adapter: Adapter
    owner: nn.Module | None

    @property
    def sharers(self) -> tuple[nn.Module, ...]:
        """The modules it shares values with, itself among them."""
        return (self.module,) if self.owner is None else self.point.sharers(self.owner)


def find_sites(model: nn.Module) -> list[PatchTarget]:
    """Every module of a model that a registered adapter can take over, found by class, whatever the config says.

    Where several points match, the one for the nearest class wins, then the adapter of a model type found in the model.

    Raises:
        InvalidArgumentError: not a module.
        PatchError: no adapter knows an attention module in the model.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError("model", f"{type(model).__name__}", "a torch.nn.Module, e.g. from from_pretrained")
    types = _model_types(model)
    adapters = registry.adapters()
    preferred = [adapters[name] for name in types if name in adapters]
    points: dict[str, list[tuple[Adapter, PatchPoint]]] = {}
    for adapter in {id(adapter): adapter for adapter in (*preferred, *adapters.values())}.values():
        for point in adapter.points:
            points.setdefault(point.cls, []).append((adapter, point))
    found = []
    for name, module in model.named_modules():
        claims = (claim for cls in type(module).__mro__ for claim in points.get(path_of(cls), ()))
        for adapter, point in claims:
            if point.serves(module):
                found.append(PatchTarget(name, module, point, adapter, point.owner(model, module)))
                break
    if not any(one.point.attends for one in found):
        raise _nothing_found(model, types, points)
    return found


def _model_types(model: nn.Module) -> tuple[str, ...]:
    configs = (getattr(module, "config", None) for module in model.modules())
    names = (getattr(config, "model_type", None) for config in configs)
    return tuple(dict.fromkeys(str(name) for name in names if name))


def _nothing_found(model: nn.Module, types: tuple[str, ...], points: Iterable[str]) -> PatchError:
    """The error for a model without a site: its type, adapters that did not load, a class with a known name."""
    reasons = [f"{name}: {reason}" for name, reason in registry.broken_adapters().items()]
    why = f" (an adapter exists but did not load: {shorten('; '.join(reasons), 200)})" if reasons else ""
    known = {path.rpartition(":")[2]: path for path in points}
    for cls in (cls for module in model.modules() for cls in type(module).__mro__):
        if cls.__name__ in known:
            why += f" ({path_of(cls)} is another class than {known[cls.__name__]})"
            break
    return PatchError(
        f"model: got {type(model).__name__} of model type {', '.join(types) or 'none (no config)'}, "
        f"in which no adapter finds an attention module{why}; allowed: a model with modules of type "
        f"{', '.join(registry.model_types())}, or register one with attnzoo.register_adapter"
    )


def check_loaded(model: nn.Module, sites: Iterable[PatchTarget]) -> None:
    """Raise if a site has weights on the meta device that no hook of accelerate brings to another one.

    Raises:
        PatchError: names the first such parameter.
    """
    for found in sites:
        for name, parameter in found.module.named_parameters(prefix=found.name):
            if parameter.is_meta and not _is_brought(model, name):
                raise PatchError(
                    f"{name}: got a parameter on the meta device, without data; allowed: a model whose weights are "
                    "loaded (from_pretrained, or accelerate.load_checkpoint_and_dispatch after init_empty_weights): "
                    "load the weights first, then patch"
                )


def _is_brought(model: nn.Module, parameter: str) -> bool:
    """Whether a hook on a module around a parameter brings its weights to a device for each forward."""
    path = parameter.split(".")[:-1]
    around = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1))
    return any(slots.runs_on(module) is not None for module in around)


def expected_requests(
    site: PatchTarget, grad: bool | None = None, sharers: tuple[nn.Module, ...] | None = None
) -> tuple[Request, ...]:
    """What a site will ask of its backend, for the model as it is now (train or eval, device, dtype, autocast).

    Args:
        site: a site.
        grad: whether something will get a gradient, if that is known; None: if anything trains.
        sharers: :attr:`PatchTarget.sharers`, if they are at hand.
    """
    module, learned = site.module, False
    if module.training if grad is None else grad:
        learned = any(map(site.point.trains_bias, site.sharers if sharers is None else sharers))  # one makes it for all
    if grad is None:
        grad = module.training and (learned or trains(module))
    dropout = module.training and site.point.dropout(module) > 0.0

    def of_now(request: Request) -> Request:
        segments = (replace(one, bias_grad=learned and one.bias is not None) for one in request.segments)
        dtype = autocast_dtype(request.dtype, request.device)
        return replace(request, dropout=dropout, grad=bool(grad), dtype=dtype, segments=tuple(segments))

    return tuple(map(of_now, site.point.requests(module)))


def expected_changes(backend: Backend, requests: tuple[Request, ...]) -> tuple[str, ...]:
    """What a backend will change of what a site is expected to ask, in words; nothing of what it refuses."""
    found = (backend.changes(request) for request in requests if not registry.refusals(backend, request))
    return tuple(dict.fromkeys(change for change in found if change is not None))


def check_options(settled: Iterable[Backend]) -> None:
    """Refuse options of a backend, settled for each of the sites it serves, that do nothing at any of them.

    Raises:
        InvalidArgumentError: names these options.
    """
    everywhere = list(settled)
    idle = [backend.unused_options() for backend in everywhere]
    if idle and all(idle):
        allowed = "no options: every attention in this patch is already local, so they would have no effect"
        raise InvalidArgumentError(f"options of backend {everywhere[0].name!r}", ", ".join(idle[0]), allowed)


def trains(module: nn.Module) -> bool:
    """Whether any parameter of the module requires grad."""
    return any(parameter.requires_grad for _, parameter in parameters_of(module))
