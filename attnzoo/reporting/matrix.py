"""The support matrix: which backend runs where in which family, and for what it refuses: why.

Families' modules come from adapters (their examples, built without weights), backends from what they declare; neither
depends on what this machine has. Each cell asks what a module asks, and one feature more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from attnzoo.backend import Backend
from attnzoo.errors import PatchError, Refusal, UnknownNameError
from attnzoo.patching.sites import expected_requests, find_sites
from attnzoo.registry import registry
from attnzoo.spec.segments import FLOATS, Request

DEVICES = ("cpu", "cuda")


def _first(request: Request, **changes: object) -> Request:
    """The request with something else about its first segment."""
    first, *rest = request.segments
    return replace(request, segments=(replace(first, **changes), *rest))  # type: ignore[arg-type]


def _key_mask(request: Request) -> Request:
    return replace(request, segments=tuple(replace(segment, key_mask=True) for segment in request.segments))


def _grouped(request: Request) -> Request:
    """Half as many key heads as query heads, where there are as many."""
    even = request.heads % 2 == 0
    segments = (
        replace(segment, kv_heads=request.heads // 2) if even and segment.kv_heads == request.heads else segment
        for segment in request.segments
    )
    return replace(request, segments=tuple(segments))


def _trained(request: Request) -> Request:
    return replace(_first(request, bias=request.segments[0].bias or "relative", bias_grad=True), grad=True)


# What a cell asks on top of what its module asks anyway.
FEATURES: Mapping[str, Callable[[Request], Request]] = {
    "forward": lambda request: request,
    "backward": lambda request: replace(request, grad=True),
    "key mask": _key_mask,
    "dense mask": lambda request: _first(request, mask=True),
    "dropout": lambda request: replace(request, dropout=True),
    "GQA": _grouped,
    "relative bias": lambda request: _first(request, bias="relative"),
    "dense bias": lambda request: _first(request, bias="dense"),
    "trained bias": _trained,
}


@dataclass(frozen=True)
class Module:
    """One kind of attention module of a family.

    Attributes:
        model_type: of transformers.
        cls: the module's class.
        pattern: what it computes, for people.
        requests: what it asks in inference.
        beside: what all modules of the same model ask.
    """

    model_type: str
    cls: str
    pattern: str
    requests: tuple[Request, ...]
    beside: tuple[Request, ...]

    def __str__(self) -> str:
        return f"{self.model_type}: {self.cls}, {self.pattern}"

    def asks(self, feature: str, device: str, dtype: torch.dtype) -> tuple[Request, ...]:
        """What it asks on a device, in a dtype, with a feature."""
        return tuple(FEATURES[feature](request) for request in _on(self.requests, device, dtype))


def _on(requests: tuple[Request, ...], device: str, dtype: torch.dtype) -> tuple[Request, ...]:
    return tuple(replace(request, device=device, dtype=dtype) for request in requests)


@dataclass(frozen=True)
class Row:
    """One backend at one kind of module.

    Attributes:
        module: the module.
        backend: the backend's name.
        options: what it is configured with here; empty if it needs nothing.
        changes: what it computes in place of the module's pattern, or empty: it is exact here.
        cells: by feature, device and dtype, why not; an empty tuple means it runs.
    """

    module: Module
    backend: str
    options: Mapping[str, object]
    changes: str
    cells: Mapping[tuple[str, str, torch.dtype], tuple[Refusal, ...]]

    def runs(self, feature: str, device: str) -> tuple[torch.dtype, ...]:
        """The dtypes in which a feature runs on a device."""
        return tuple(dtype for dtype in FLOATS if not self.cells[feature, device, dtype])

    def reasons(self, feature: str) -> tuple[Refusal, ...]:
        """Every reason for which a feature is refused, on any device, in any dtype."""
        found = (self.cells[feature, device, dtype] for device in DEVICES for dtype in FLOATS)
        return tuple(dict.fromkeys(reason for reasons in found for reason in reasons))


def families(model_types: tuple[str, ...] = ()) -> dict[str, tuple[Module, ...] | str]:
    """The kinds of attention modules by model type; a text where they cannot be shown: why.

    Args:
        model_types: which; none: all that somebody offers an adapter for.

    Raises:
        UnknownNameError: nobody offers an adapter for one of them.
    """
    known = registry.model_types()
    for model_type in model_types:
        if model_type not in known:
            raise UnknownNameError("model_type", model_type, known)
    found: dict[str, tuple[Module, ...] | str] = {}
    for model_type in model_types or known:
        try:
            found[model_type] = _modules(model_type)
        except Exception as error:  # an adapter, or its examples, may be anybody's
            found[model_type] = f"{type(error).__name__}: {error}"
    return found


def _modules(model_type: str) -> tuple[Module, ...]:
    """From the examples of the family's adapter, built without weights."""
    from transformers import AutoConfig, AutoModel

    adapter = registry.find_adapter(model_type)
    if adapter is None:
        raise PatchError(f"adapter: got {registry.broken_adapters().get(model_type)}; allowed: one that loads")
    found: dict[tuple[str, str, tuple[Request, ...]], Module] = {}
    for example in adapter.examples:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(model_type, **example)).eval()
        sites = [site for site in find_sites(model) if site.point.attends]
        asked = [expected_requests(site) for site in sites]
        beside = tuple(dict.fromkeys(request for requests in asked for request in requests))
        for site, requests in zip(sites, asked, strict=True):
            key = (type(site.module).__name__, site.point.describe(site.module), requests)
            found.setdefault(key, Module(model_type, *key, beside))
    return tuple(found.values())


def configured(cls: type[Backend], module: Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Backend:
    """A backend as it serves a module: without options where that will do, else with those of its example."""
    requests, beside = _on(module.requests, device, dtype), _on(module.beside, device, dtype)
    if not cls.required_options():
        plain = cls().bind_to_site(requests, beside)
        reasons = (reason for request in requests for reason in plain.refusals_anywhere(request))
        if not cls.example or not any(reason.field == "options" for reason in reasons):
            return plain
    return cls(**cls.example).bind_to_site(requests, beside)


def row(cls: type[Backend], module: Module) -> Row:
    """What a backend says to everything a module may ask."""
    lacking = [option for option in cls.required_options() if option not in cls.example]
    if lacking:
        reason = Refusal("options", f"no {', '.join(lacking)}", f"{lacking[0]}=...")
        return Row(module, cls.name, {}, "", {place: (reason,) for place in _places()})
    cells = {}
    for feature, device, dtype in _places():
        made = configured(cls, module, device, dtype)
        reasons = (made.refusals_anywhere(request) for request in module.asks(feature, device, dtype))
        cells[feature, device, dtype] = tuple(dict.fromkeys(reason for one in reasons for reason in one))
    made = configured(cls, module)
    changes = dict.fromkeys(change for request in module.requests if (change := made.changes(request)))
    options = {name: getattr(made, name) for name in cls.example} if changes else {}
    return Row(module, cls.name, options, "; ".join(changes), cells)


def _places() -> Iterator[tuple[str, str, torch.dtype]]:
    for feature in FEATURES:
        for device in DEVICES:
            for dtype in FLOATS:
                yield feature, device, dtype


def rows(module: Module) -> tuple[Row, ...]:
    """What every registered backend says to a module; one that failed to load says nothing."""
    names = (name for name, info in registry.backends().items() if info.capabilities is not None)
    return tuple(row(registry.backend_class(name), module) for name in names)
