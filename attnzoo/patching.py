"""Patching a model's attention in place: per instance, reversible, stackable, all or nothing."""

from __future__ import annotations

import fnmatch
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from attnzoo import registry, slots
from attnzoo.adapter import Adapter, Seam
from attnzoo.backend import Backend
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, PatchError, Refusal
from attnzoo.functional import compute_dtype, execute, negotiate
from attnzoo.segments import Attention, Request, Result

T = TypeVar("T")
Observer = Callable[["Site", Attention, Result, Backend], None]
_patch_numbers = itertools.count(1)


@dataclass(eq=False)
class Site:
    """One patched attention module.

    Attributes:
        name: the module's name in the model.
        cls: its class.
        pattern: what it computes, for people.
        backend: the backend that was asked for; ``"native"`` is the model's own code.
        kernels: how often each kernel really ran.
        calls: how many attentions really ran on the backend.
        fallbacks: how many forwards went to the model's own code under ``fallback="native"``.
        observer: called after every attention with the site, the attention, its result and the backend that ran.
    """

    name: str
    cls: str
    pattern: str
    backend: str
    kernels: Counter[str] = field(default_factory=Counter)
    fallbacks: int = 0
    observer: Observer | None = field(default=None, repr=False)

    @property
    def calls(self) -> int:
        return sum(self.kernels.values())

    @property
    def kernel(self) -> str | None:
        """What really ran so far, most frequent first; None before the first call."""
        return "+".join(kernel for kernel, _ in self.kernels.most_common()) or None


class Found(NamedTuple):
    """A module that can be patched."""

    name: str
    module: nn.Module
    seam: Seam
    adapter: Adapter


def find_sites(model: nn.Module) -> list[Found]:
    """Every attention module of a model that a registered adapter can take over.

    Raises:
        InvalidArgumentError: not a module.
        PatchError: no adapter serves any model type found in the model.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError("model", f"{type(model).__name__}", "a torch.nn.Module, e.g. from from_pretrained")
    types = dict.fromkeys(
        str(config.model_type)
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None and getattr(config, "model_type", None)
    )
    adapters = {id(adapter): adapter for name in types if (adapter := registry.find_adapter(name)) is not None}
    found = {
        id(module): Found(name, module, seam, adapter)
        for adapter in adapters.values()
        for name, module, seam in adapter.sites(model)
    }
    if not any(one.seam.attends for one in found.values()):
        broken = [f"{name}: {reason}" for name in types if (reason := registry.broken_adapter(name))]
        why = f" (an adapter exists but did not load: {'; '.join(broken)})" if broken else ""
        raise PatchError(
            f"model: got {type(model).__name__} of model type {', '.join(types) or 'none (no config)'}, "
            f"in which no adapter finds an attention module{why}; allowed: a model with modules of type "
            f"{', '.join(registry.model_types())}, or register one with attnzoo.register_adapter"
        )
    return list(found.values())


def expected_requests(site: Found) -> tuple[Request, ...]:
    """What a site will ask of its backend, for the model as it is now (train or eval, device, dtype)."""
    module = site.module
    grad = module.training and _trains(module)
    dropout = module.training and site.seam.dropout(module) > 0.0
    return tuple(replace(request, dropout=dropout, grad=grad) for request in site.seam.requests(module))


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class _Attend:
    """What a seam's forward computes with: a backend, a site to record on, and the patch's per-forward memory."""

    def __init__(
        self,
        site: Site,
        backend: Backend | None,
        fallback: bool,
        memory: WeakTensorKeyDictionary,
        sharers: tuple[nn.Module, ...],
    ) -> None:
        self.site, self.backend, self._fallback, self._memory = site, backend, fallback, memory
        self._sharers = sharers

    @property
    def complete(self) -> bool:
        last = [next(_layers(module), None) for module in self._sharers]
        return bool(last) and not any(patched is None or patched.native or patched.fallback for patched in last)

    def __call__(self, attention: Attention, probabilities: bool = False) -> Result:
        backend = registry.choose(attention.request(probabilities)) if self.backend is None else self.backend
        result = execute(backend, attention, probabilities, self.site.name)
        self.site.kernels[result.kernel] += 1
        if self.site.observer is not None:
            self.site.observer(self.site, attention, result, backend)
        return result

    def falls_back(self, can: bool = True) -> bool:
        self.site.fallbacks += self._fallback and can
        return self._fallback and can

    def once(self, tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
        if tensor.is_inference() or torch.compiler.is_compiling():
            return make(tensor)  # inference tensors count no versions, and their ids may come again
        made = self._memory.setdefault(tensor, {})
        version = tensor._version
        if name not in made or made[name][0] != version:
            value = make(tensor)
            if _shares_memory(value, tensor):
                return value  # to keep it would keep the tensor, which would keep the entry, for ever
            made[name] = (version, value)
        known: T = made[name][1]
        return known


def _shares_memory(value: Any, tensor: Tensor) -> bool:
    """Whether a tensor made from another, or one of a tuple of them, is that tensor or a view of it."""
    pointer = tensor.untyped_storage().data_ptr()
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, Tensor) and part.untyped_storage().data_ptr() == pointer for part in parts)


class PatchedForward:
    """What sits in a patched module's forward slot. Copies itself with the module; refuses to be pickled."""

    def __init__(
        self,
        number: int,
        group: tuple[str, ...],
        found: Found,
        site: Site,
        backend: Backend | None,
        native: bool,
        fallback: bool,
        memory: WeakTensorKeyDictionary,
        sharers: tuple[nn.Module, ...],
    ) -> None:
        self._set_up(number, group, found, site, backend, native, fallback, memory, sharers)
        self.original = slots.current(found.module)
        functools.update_wrapper(self, self.original, updated=())

    def _set_up(
        self,
        number: int,
        group: tuple[str, ...],
        found: Found,
        site: Site,
        backend: Backend | None,
        native: bool,
        fallback: bool,
        memory: WeakTensorKeyDictionary,
        sharers: tuple[nn.Module, ...],
    ) -> None:
        """All but the original. ``group`` names the sites the patch ``number`` was put on."""
        self.number, self.group, self.found, self.site = number, group, found, site
        self.backend, self.native, self.fallback = backend, native, fallback
        self.sharers = sharers
        self._attend = _Attend(site, backend, fallback, memory, sharers)
        self._forward: Callable[..., Any] | None = None if native else found.seam.bind(found.module, self._attend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward is None:
            self.site.kernels["native"] += 1
            return self.own(*args, **kwargs)
        try:
            self._negotiate((*args, *kwargs.values()), kwargs)
        except BackendRefusedError:
            seam, module = self.found.seam, self.found.module
            serves = seam.native_probabilities(module) or not self._wants_probabilities(kwargs)
            if not self._attend.falls_back(serves and seam.fault(module) is None):
                raise
            return self.own(*args, **kwargs)
        return self._forward(*args, **kwargs)

    @property
    def own(self) -> Callable[..., Any]:
        """The model's own forward, beneath every patch."""
        forward = self.original
        while isinstance(forward, PatchedForward):
            forward = forward.original
        return forward

    def _wants_probabilities(self, kwargs: Mapping[str, Any]) -> bool:
        return self.found.seam.wants_probabilities(self.found.module, kwargs)

    def _negotiate(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse before anything happens what can be known before anything happens."""
        if self.backend is None:
            return
        probabilities = self._wants_probabilities(kwargs)
        grad = torch.is_grad_enabled() and (
            _trains(self.found.module) or any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        )
        for request in expected_requests(self.found):
            dtype = compute_dtype(torch.empty(0, dtype=request.dtype, device=request.device))
            asked = replace(request, probabilities=probabilities, grad=grad, dtype=dtype)
            negotiate(self.backend, asked, self.site.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedForward:
        import copy

        twin = object.__new__(PatchedForward)
        memo[id(self)] = twin
        found = self.found._replace(module=copy.deepcopy(self.found.module, memo))
        site = replace(self.site, kernels=Counter(self.site.kernels))
        sharers, memory = copy.deepcopy(self.sharers, memo), WeakTensorKeyDictionary()
        twin._set_up(self.number, self.group, found, site, self.backend, self.native, self.fallback, memory, sharers)
        twin.original = copy.deepcopy(self.original, memo)
        functools.update_wrapper(twin, twin.original, updated=())
        return twin

    def __reduce__(self) -> Any:
        raise PatchError(
            f"{self.site.name}: a patched model cannot be pickled; allowed: model.save_pretrained, "
            "state_dict, or attnzoo.unpatch(model) first"
        )


@dataclass(eq=False)
class Handle:
    """A patch in place. Prints as a table; a context manager that removes the patch on leaving.

    Attributes:
        sites: one :class:`Site` per patched module.
    """

    sites: tuple[Site, ...]
    forwards: tuple[PatchedForward, ...] = field(repr=False)

    @property
    def active(self) -> bool:
        """Whether the patch is in place."""
        return any(forward in _layers(forward.found.module) for forward in self.forwards)

    def remove(self) -> None:
        """Put the original forwards back, exactly.

        Raises:
            PatchError: the patch is not in place any more, or is not the last one (patches come off last in, first
                out), or something else has replaced a patched forward since; nothing is changed then.
        """
        _remove(self.forwards)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __str__(self) -> str:
        rows = [("site", "class", "pattern", "backend", "kernel", "calls", "fallbacks")]
        for site in self.sites:
            numbers = (str(site.calls), str(site.fallbacks))
            rows.append((site.name, site.cls, site.pattern, site.backend, site.kernel or "-", *numbers))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _layers(module: nn.Module) -> Iterator[PatchedForward]:
    """The patches of one module, last in first."""
    for slot in ("_old_forward", "forward"):
        forward = vars(module).get(slot)
        while isinstance(forward, PatchedForward):
            yield forward
            forward = forward.original


def _remove(forwards: Sequence[PatchedForward]) -> None:
    for forward in forwards:
        layers = list(_layers(forward.found.module))
        if forward not in layers:
            raise PatchError(
                f"{forward.site.name}: got a module whose forward is not this patch's; allowed: removing a patch once, "
                "and while nothing else has replaced the forward since"
            )
        if layers[0] is not forward:
            raise PatchError(
                f"{forward.site.name}: got a patch with a later one on top; allowed: removing them last in, first out"
            )
    for forward in forwards:
        slots.take_back(forward.found.module, forward, forward.original)


def unpatch(model: nn.Module) -> None:
    """Remove the last patch of a model, exactly. Works on deep copies of a patched model too.

    Raises:
        PatchError: the model is not patched.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError("model", type(model).__name__, "a torch.nn.Module")
    layers = [forward for module in model.modules() for forward in _layers(module)]
    if not layers:
        raise PatchError(f"model: got {type(model).__name__}, which is not patched; allowed: a patched model")
    last = max(forward.number for forward in layers)
    forwards = [forward for forward in layers if forward.number == last]
    lost = [name for name in forwards[0].group if name not in {forward.site.name for forward in forwards}]
    if lost:
        raise PatchError(
            f"model: got one in which the last patch is no longer in place at {', '.join(lost)}; allowed: the whole "
            "model, while nothing else has replaced a patched forward"
        )
    _remove(forwards)


def unpatch_all(model: nn.Module) -> None:
    """Remove every patch of a model, if there is any."""
    while any(True for module in model.modules() for _ in _layers(module)):
        unpatch(model)


def patch(
    model: nn.Module,
    backend: str | Mapping[str, str] = "auto",
    *,
    fallback: str = "error",
    **options: Any,
) -> Handle:
    """Replace how a model attends, in place.

    Args:
        model: a Hugging Face model of a family with an adapter (see ``attnzoo doctor``), or a part of one.
        backend: a backend name or alias, ``"auto"`` (the best that refuses nothing), ``"native"`` (the model's own
            code, counted), or ``{glob over module names: name}``: the first glob that matches decides; modules that
            none matches stay as they are.
        fallback: ``"error"``: what the backend cannot do raises; ``"native"``: that forward runs the model's own
            code, and is counted in ``Site.fallbacks``.
        options: go to the backend, e.g. ``window=1024``.

    Returns:
        A :class:`Handle`. Weights, state_dict, config and every other model stay untouched.

    Raises:
        InvalidArgumentError, UnknownNameError: a bad argument.
        PatchError: no site is reached. DriftError: the model's code is not what the adapter was verified against.
        BackendRefusedError: a site will ask what the backend cannot do (unless ``fallback="native"``).
        Whatever is raised, nothing was changed.
    """
    if fallback not in ("error", "native"):
        raise InvalidArgumentError("fallback", repr(fallback), "'error' or 'native'")
    everything = find_sites(model)
    chosen = _assign([found for found in everything if found.seam.attends], backend)
    chosen += _companions(everything, chosen)
    made = {name: _make(name, options) for name in dict.fromkeys(name for _, name in chosen)}
    refused: dict[str, tuple[Refusal, ...]] = {}
    alternatives: dict[str, tuple[str, ...]] = {}
    refusers: list[str] = []
    for found, name in chosen:
        if name == "native":
            continue
        found.adapter.check_drift(found.seam, found.module)
        check_forward(found)
        found.seam.check(found.module)
        instance = made[name]
        for request in expected_requests(found) if instance is not None and fallback == "error" else ():
            try:
                negotiate(instance, request, found.name)  # type: ignore[arg-type]
            except BackendRefusedError as error:
                refusers.append(error.backend)
                for where, reasons in error.refusals.items():
                    refused[where] = tuple(dict.fromkeys((*refused.get(where, ()), *reasons)))
                    others = alternatives.get(where, error.alternatives[where])
                    alternatives[where] = tuple(name for name in others if name in error.alternatives[where])
    if refused:
        raise BackendRefusedError(", ".join(dict.fromkeys(refusers)), refused, alternatives)
    number, memory = next(_patch_numbers), WeakTensorKeyDictionary()
    group = tuple(found.name for found, _ in chosen)
    forwards: list[PatchedForward] = []
    for found, name in chosen:
        cls = type(found.module).__name__
        instance = made[name]
        shown = instance.name if instance is not None else name
        site = Site(found.name, cls, found.seam.describe(found.module), shown)
        native, falls = name == "native", fallback == "native"
        sharers = found.seam.sharers(model, found.module)
        forwards.append(PatchedForward(number, group, found, site, instance, native, falls, memory, sharers))
    for forward in forwards:
        slots.put(forward.found.module, forward)
    return Handle(tuple(forward.site for forward in forwards if forward.found.seam.attends), tuple(forwards))


def _companions(everything: list[Found], chosen: list[tuple[Found, str]]) -> list[tuple[Found, str]]:
    """Modules that attend nothing, and are taken over because a module inside them is."""
    inside = [found.module for found, name in chosen if name != "native"]
    return [
        (found, "auto")
        for found in everything
        if not found.seam.attends and any(module in inside for module in found.module.modules())
    ]


def check_forward(found: Found) -> None:
    """Refuse to bypass a forward that somebody put on the instance.

    Raises:
        PatchError: the module's forward is neither its class's nor a patch of ours.
    """
    forward = slots.current(found.module)
    plain = getattr(forward, "__func__", None) is type(found.module).forward
    if not plain and not isinstance(forward, PatchedForward):
        raise PatchError(
            f"{found.name}: got a module whose forward was replaced by {forward!r}; allowed: the class's own forward "
            "(accelerate's hooks may be around it), or attnzoo's patches"
        )


def _assign(sites: list[Found], backend: str | Mapping[str, str]) -> list[tuple[Found, str]]:
    if isinstance(backend, str):
        return [(found, backend) for found in sites]
    pairs = backend.items() if isinstance(backend, Mapping) else ()
    if not pairs or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise InvalidArgumentError("backend", repr(backend), "a name, or {glob over module names: name}")
    names = [found.name for found in sites]
    for glob in backend:
        if not fnmatch.filter(names, glob):
            raise PatchError(f"backend: got glob {glob!r}, which matches no site; allowed: one that does of {names}")
    return [
        (found, name)
        for found in sites
        for name in [next((name for glob, name in backend.items() if fnmatch.fnmatchcase(found.name, glob)), None)]
        if name is not None
    ]


def _make(name: str, options: Mapping[str, Any]) -> Backend | None:
    """The configured backend behind a name; None for ``auto`` and ``native``, which take no options."""
    if name not in registry.RESERVED:
        return registry.make_backend(name, **options)
    if options:
        raise InvalidArgumentError("options", f"{sorted(options)} with backend {name!r}", "options of a named backend")
    return None
