"""The support matrix: whether each backend runs each feature at each attention module, and the reasons if not.

The modules come from the examples of adapters, which are models without weights. The refusals come from declarations of
backends. So the matrix does not depend on this machine. Each cell takes the requests of a module and adds one feature.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from attnzoo.backend import Backend
from attnzoo.errors import PatchError, Refusal, UnknownNameError
from attnzoo.functional import refusals_of
from attnzoo.patching.plan import changes_of
from attnzoo.patching.sites import find_sites
from attnzoo.registry import registry
from attnzoo.spec.segments import FLOATS, Request

DEVICES = ("cpu", "cuda")


def _first(request: Request, **changes: object) -> Request:
    """Return a copy of the request in which ``changes`` replace fields of the first segment."""
    first, *rest = request.segments
    return replace(request, segments=(replace(first, **changes), *rest))  # type: ignore[arg-type]


def _key_mask(request: Request) -> Request:
    return replace(request, segments=tuple(replace(segment, key_mask=True) for segment in request.segments))


def _grouped(request: Request) -> Request:
    """Halve the key heads of each segment that has one key head per query head, if the number of heads is even."""
    even = request.heads % 2 == 0
    segments = (
        replace(segment, kv_heads=request.heads // 2) if even and segment.kv_heads == request.heads else segment
        for segment in request.segments
    )
    return replace(request, segments=tuple(segments))


def _trained(request: Request) -> Request:
    return replace(_first(request, bias=request.segments[0].bias or "relative", bias_grad=True), grad=True)


# How each feature changes the requests of a module.
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
    "softcap": lambda request: replace(request, softcap=True),
}


@dataclass(frozen=True)
class Module:
    """One kind of attention module of a family.

    Attributes:
        cls: name of the module's class.
        pattern: description of the module's attention pattern.
        requests: requests of the module in inference.
        together: requests of all attention modules of the same model.
    """

    model_type: str
    cls: str
    pattern: str
    requests: tuple[Request, ...]
    together: tuple[Request, ...]

    def __str__(self) -> str:
        return f"{self.model_type}: {self.cls}, {self.pattern}"

    def requests_with(self, feature: str, device: str, dtype: torch.dtype) -> tuple[Request, ...]:
        """Return the requests of the module on ``device`` in ``dtype``, with ``feature`` added."""
        return tuple(FEATURES[feature](request) for request in _on(self.requests, device, dtype))


def _on(requests: tuple[Request, ...], device: str, dtype: torch.dtype) -> tuple[Request, ...]:
    return tuple(replace(request, device=device, dtype=dtype) for request in requests)


@dataclass(frozen=True)
class Row:
    """The results of one backend at one kind of module.

    Attributes:
        options: options that the backend needs at this module.
        changes: description of how the backend changes the module's pattern. Empty if the backend is exact.
        cells: refusals by feature, device and dtype. An empty tuple means that the backend runs.
    """

    module: Module
    backend: str
    options: Mapping[str, object]
    changes: str
    cells: Mapping[tuple[str, str, torch.dtype], tuple[Refusal, ...]]

    def runs(self, feature: str, device: str) -> tuple[torch.dtype, ...]:
        """Return the dtypes in which a feature runs on a device."""
        return tuple(dtype for dtype in FLOATS if not self.cells[feature, device, dtype])

    def reasons(self, feature: str) -> tuple[Refusal, ...]:
        """Return all reasons why the backend refuses a feature, on all devices and in all dtypes."""
        cells = (self.cells[feature, device, dtype] for device in DEVICES for dtype in FLOATS)
        return tuple(dict.fromkeys(reason for reasons in cells for reason in reasons))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        cells = []
        for (feature, device, dtype), reasons in self.cells.items():
            place = {"feature": feature, "device": device, "dtype": str(dtype).removeprefix("torch.")}
            cells.append({**place, "refusals": [asdict(reason) for reason in reasons]})
        module = {"module": self.module.cls, "pattern": self.module.pattern}
        return {**module, "backend": self.backend, "options": self.options, "changes": self.changes, "cells": cells}


Families = dict[str, tuple[Module, ...] | str]


def families(model_types: tuple[str, ...] = ()) -> Families:
    """Return the kinds of attention modules of each model type or, if an example model cannot be built, the reason.

    An empty ``model_types`` means all model types that have an adapter.
    """
    known = registry.model_types()
    for model_type in model_types:
        if model_type not in known:
            raise UnknownNameError("model_type", model_type, known)
    modules: Families = {}
    for model_type in model_types or known:
        try:
            modules[model_type] = _modules(model_type)
        except Exception as error:  # adapters of other packages and their examples may raise anything
            modules[model_type] = f"{type(error).__name__}: {error}"
    return modules


def _modules(model_type: str) -> tuple[Module, ...]:
    from transformers import AutoConfig, AutoModel

    adapter = registry.find_adapter(model_type)
    if adapter is None:
        raise PatchError(f"adapter: got {registry.broken_adapters().get(model_type)}; allowed: an adapter that loads")
    modules: dict[tuple[str, str, tuple[Request, ...]], Module] = {}
    for example in adapter.examples:
        with torch.device("meta"):
            config = AutoConfig.for_model(**{"model_type": model_type, **example})
            model = AutoModel.from_config(config).eval()
        requests = {site: site.expected_requests() for site in find_sites(model) if site.point.attends}
        together = tuple(dict.fromkeys(request for some in requests.values() for request in some))
        for site, some in requests.items():
            key = (site.cls.__name__, site.point.describe(site.module), some)
            modules.setdefault(key, Module(model_type, *key, together))
    return tuple(modules.values())


def configured(cls: type[Backend], module: Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Backend:
    """Return a backend of class ``cls`` for a module, with the options of ``cls.example`` if it needs options."""
    requests, together = _on(module.requests, device, dtype), _on(module.together, device, dtype)
    if not cls.required_options():
        bare = cls().bind_to_site(requests, together)
        needs_options = any(reason.field == "options" for reason in refusals_of(bare, requests, anywhere=True))
        if not (cls.example and needs_options):
            return bare
    return cls(**cls.example).bind_to_site(requests, together)


def row(cls: type[Backend], module: Module) -> Row:
    """Return the row of a backend at a module, with the refusals in every cell."""
    lacking = [option for option in cls.required_options() if option not in cls.example]
    if lacking:
        reason = Refusal("options", f"no value for {', '.join(lacking)}", f"values, e.g. {lacking[0]}=...")
        return Row(module, cls.name, {}, "", dict.fromkeys(_cells(), (reason,)))
    backends = {place: configured(cls, module, *place) for place in itertools.product(DEVICES, FLOATS)}
    cells = {
        (feature, device, dtype): refusals_of(
            backends[device, dtype], module.requests_with(feature, device, dtype), anywhere=True
        )
        for feature, device, dtype in _cells()
    }
    backend = configured(cls, module)
    changes = changes_of(backend, module.requests_with("forward", "cpu", torch.float32), anywhere=True)
    options = {name: getattr(backend, name) for name in cls.example} if changes else {}
    return Row(module, cls.name, options, "; ".join(changes), cells)


def _cells() -> Iterator[tuple[str, str, torch.dtype]]:
    return itertools.product(FEATURES, DEVICES, FLOATS)


def rows(module: Module) -> tuple[Row, ...]:
    """Return one row for each registered backend that was loaded without an error."""
    names = (name for name, info in registry.backends().items() if info.capabilities is not None)
    return tuple(row(registry.backend_class(name), module) for name in names)


def matrix_to_dict(families: Families) -> dict[str, Any]:
    """Return the support matrix as plain data for JSON."""
    return {
        name: modules if isinstance(modules, str) else [row.to_dict() for module in modules for row in rows(module)]
        for name, modules in families.items()
    }
