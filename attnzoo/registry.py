"""The registry: names to backends, model types to adapters.

Nothing is imported before it is asked for. What cannot be imported is remembered with its reason, never raised at
import time. attnzoo's own backends and adapters arrive the same way as anybody's: by entry point
(groups ``attnzoo.backends`` and ``attnzoo.adapters``) or by decorator.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from attnzoo.backend import Backend, BackendInfo
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, Refusal, UnknownNameError, raise_interrupts
from attnzoo.tuning import cache
from attnzoo.tuning.choice import Choice, by_measurement, by_priority_because, wrongs
from attnzoo.tuning.environment import Environment, environment_of
from attnzoo.tuning.measurements import SizeClass, key_of, mode_of, size_class

if TYPE_CHECKING:
    from attnzoo.adapter import Adapter
    from attnzoo.segments import Attention, Request

RESERVED = ("auto", "native")

_BackendType = TypeVar("_BackendType", bound=type[Backend])
_lock = threading.RLock()
_backends: dict[str, type[Backend]] = {}
_adapters: dict[str, Adapter] = {}
_broken_backends: dict[str, str] = {}
_left_out: dict[str, str] = {}
_broken_adapters: dict[str, str] = {}
_discovered = False


def _discover() -> None:
    """Load the backends of all entry points, once. A broken one becomes a reason."""
    global _discovered
    with _lock:
        if _discovered:
            return
        _discovered = True
        for entry in metadata.entry_points(group="attnzoo.backends"):
            reason = ""
            try:
                cls = entry.load()
                owner = _backends.get(entry.name)  # a class may register itself when it is loaded
                if owner is None:
                    register_backend(cls)
                elif owner is not cls:
                    reason = f"{entry.value} is left out: {owner.__module__}:{owner.__qualname__} has the name"
            except BaseException as error:
                raise_interrupts(error)
                reason = f"{entry.value} failed to load: {type(error).__name__}: {error}"
            if reason:
                (_left_out if entry.name in _backends else _broken_backends)[entry.name] = reason


def left_out() -> dict[str, str]:
    """By the name of a registered backend: why another one that was offered under it (the last such) is none."""
    _discover()
    return dict(_left_out)


def register_backend(cls: _BackendType, *, replace: bool = False) -> _BackendType:
    """Register a backend class; usable as a decorator.

    Args:
        cls: a subclass of :class:`attnzoo.Backend` with a name of its own.
        replace: allow taking over a name that is registered already.

    Returns:
        The class, unchanged.

    Raises:
        InvalidArgumentError: not a backend class, or one of its names is taken or reserved.
    """
    if not (isinstance(cls, type) and issubclass(cls, Backend) and cls.name):
        raise InvalidArgumentError("cls", repr(cls), "a subclass of attnzoo.Backend with a name")
    _discover()
    with _lock:
        others = {name for other in _backends.values() if other is not cls for name in (other.name, *other.aliases)}
        taken = set(RESERVED) if replace else others | set(RESERVED)
        for name in (cls.name, *cls.aliases):
            if name in taken:
                raise InvalidArgumentError("backend name", repr(name), f"a name other than {sorted(taken)}")
        _backends.pop(cls.name, None)  # the last registered owns a name
        _backends[cls.name] = cls
        _broken_backends.pop(cls.name, None)
        _forget()
    return cls


def _forget() -> None:
    """Forget what was decided with other backends registered: what ``auto`` takes, and refusals that follow from it."""
    choose.cache_clear()
    refusals.cache_clear()


def unregister_backend(name: str) -> None:
    """Forget a registered backend. Models patched with it keep it.

    Raises:
        UnknownNameError: no backend of that name is registered.
    """
    cls = backend_class(name)
    with _lock:
        del _backends[cls.name]
        _forget()


def register_adapter(adapter: Adapter, *, replace: bool = False) -> Adapter:
    """Register the adapter of one or more model types.

    Args:
        adapter: tells which modules of a model attend, and how.
        replace: allow taking over a model type that has an adapter already.

    Raises:
        InvalidArgumentError: not an adapter, or a model type is taken.
    """
    from attnzoo.adapter import Adapter

    if not isinstance(adapter, Adapter):
        raise InvalidArgumentError("adapter", repr(adapter), "an attnzoo.Adapter")
    with _lock:
        for model_type in adapter.model_types:
            if not replace and _adapters.get(model_type, adapter) is not adapter:
                raise InvalidArgumentError("model_type", repr(model_type), "one without an adapter, or replace=True")
        for model_type in adapter.model_types:
            _adapters[model_type] = adapter
    return adapter


def unregister_adapter(model_type: str) -> None:
    """Forget the registered adapter of a model type; one that came by entry point is found again when needed."""
    with _lock:
        if _adapters.pop(model_type, None) is None:
            raise UnknownNameError("model_type", model_type, _adapters)


def find_adapter(model_type: str) -> Adapter | None:
    """The adapter of a transformers ``config.model_type``, loaded when first asked for; None if nobody offers one."""
    with _lock:
        if model_type in _adapters:
            return _adapters[model_type]
        offers = metadata.entry_points(group="attnzoo.adapters", name=model_type)
        return next((adapter for entry in offers if (adapter := _load_adapter(entry)) is not None), None)


def adapters() -> dict[str, Adapter]:
    """Every adapter by model type: the registered ones, and those offered by entry point that load."""
    with _lock:
        for entry in metadata.entry_points(group="attnzoo.adapters"):
            if entry.name not in _adapters:
                _load_adapter(entry)
        return dict(_adapters)


def _load_adapter(entry: metadata.EntryPoint) -> Adapter | None:
    """Load and register an offered adapter; None, and a reason to show, where that fails."""
    try:
        adapter = register_adapter(entry.load())
    except BaseException as error:
        raise_interrupts(error)
        _broken_adapters[entry.name] = f"{entry.value} failed to load: {type(error).__name__}: {error}"
        return None
    _broken_adapters.pop(entry.name, None)
    return adapter


def left_out_adapters(model_type: str) -> tuple[str, ...]:
    """Why others that are offered for a model type are not its adapter: it has one, or they do not load."""
    owner, reasons = find_adapter(model_type), []
    for entry in metadata.entry_points(group="attnzoo.adapters", name=model_type):
        try:
            if entry.load() is not owner:
                reasons.append(f"{entry.value} is left out: the model type has an adapter")
        except BaseException as error:
            raise_interrupts(error)
            reasons.append(f"{entry.value} failed to load: {type(error).__name__}: {error}")
    return tuple(reasons) if owner is not None else ()


def broken_adapter(model_type: str) -> str | None:
    """Why an offered adapter could not be loaded."""
    return _broken_adapters.get(model_type)


def broken_adapters() -> dict[str, str]:
    """By model type, why an offered adapter could not be loaded when it was last asked for."""
    return dict(_broken_adapters)


def model_types() -> tuple[str, ...]:
    """Every model type somebody offers an adapter for."""
    return tuple(sorted({*_adapters, *(entry.name for entry in metadata.entry_points(group="attnzoo.adapters"))}))


def backends() -> dict[str, BackendInfo]:
    """Every registered backend: name, aliases, available, reason (why not), exact, capabilities, options."""
    _discover()
    found = {}
    for name, cls in _backends.items():
        reason = _unavailable(cls)
        found[name] = BackendInfo(
            name, _aliases(cls), reason is None, reason or "", cls.capabilities.exact, cls.capabilities, cls.options()
        )
    for name, reason in _broken_backends.items():
        found[name] = BackendInfo(name, (), False, reason, False, None)
    return dict(sorted(found.items()))


def _owner(name: str) -> type[Backend] | None:
    """The last registered backend that goes by the name."""
    return next((cls for cls in reversed(_backends.values()) if name in (cls.name, *cls.aliases)), None)


def _aliases(cls: type[Backend]) -> tuple[str, ...]:
    return tuple(alias for alias in cls.aliases if _owner(alias) is cls)


def _unavailable(cls: type[Backend]) -> str | None:
    try:
        return cls.unavailable()
    except BaseException as error:
        raise_interrupts(error)
        return f"availability check failed: {type(error).__name__}: {error}"


def backend_class(name: str) -> type[Backend]:
    """The class behind a name or alias.

    Raises:
        InvalidArgumentError: the name belongs to a backend that failed to load.
        UnknownNameError: the name is not registered; near misses are suggested.
    """
    _discover()
    named = name if isinstance(name, str) else ""  # an array, say, cannot even be compared with names
    owner = _owner(named)
    if owner is not None:
        return owner
    if named in _broken_backends:
        raise InvalidArgumentError("backend", f"{name!r}: {_broken_backends[name]}", "a backend that loads")
    known = {alias for cls in _backends.values() for alias in (cls.name, *_aliases(cls))}
    if named in RESERVED:
        names = ", ".join(map(repr, sorted(known)))
        raise InvalidArgumentError("backend", f"{name!r}, a selection mode and no backend", names)
    raise UnknownNameError("backend", name, known | set(RESERVED))


def configure(name: str, **options: Any) -> Backend:
    """A configured backend, whether it can run on this machine or not: for wherever a backend's name may stand.

    Args:
        name: of a backend, or an alias.
        options: its own, e.g. ``window=1024``; :func:`backends` lists their names.

    Raises:
        UnknownNameError: unknown backend or option name.
        InvalidArgumentError: an option is missing or has a value that is not allowed.
    """
    cls = backend_class(name)
    for option in options:
        if option not in cls.options():
            raise UnknownNameError(f"option of backend {cls.name!r}", option, cls.options())
    missing = [option for option in cls.required_options() if option not in options]
    if missing:
        raise InvalidArgumentError(f"options of backend {cls.name!r}", f"no {', '.join(missing)}", f"{missing[0]}=...")
    return cls(**options)


def availability(backend: Backend) -> tuple[Refusal, ...]:
    """Why a backend cannot run on this machine; empty if it can."""
    reason = _unavailable(type(backend))
    return () if reason is None else (Refusal("availability", reason, "a machine that has it"),)


@lru_cache(maxsize=4096)
def refusals(backend: Backend, request: Request) -> tuple[Refusal, ...]:
    """The backend's refusals of a request, and why it cannot run here at all, remembered."""
    return (*availability(backend), *backend.refusals(request))


def make_backend(name: str, **options: Any) -> Backend:
    """A configured backend that can run on this machine.

    Raises:
        UnknownNameError, InvalidArgumentError: see :func:`configure`.
        BackendRefusedError: the backend cannot run on this machine.
    """
    made = configure(name, **options)
    reasons = availability(made)
    if reasons:
        usable = tuple(backend.name for backend in exact_backends())
        raise BackendRefusedError(made.name, {"this machine": reasons}, {"this machine": usable})
    return made


def takers(request: Request) -> tuple[str, ...]:
    """Names of the available exact backends that refuse nothing of the request, best first."""
    return tuple(backend.name for backend in candidates(request))


def candidates(request: Request) -> tuple[Backend, ...]:
    """What ``auto`` chooses from: the available exact backends that refuse nothing, by priority.

    Backends that change a dense model's pattern are none, nor those whose options have to be given.
    """
    return tuple(backend for backend in exact_backends() if not backend.refusals(request))


def exact_backends() -> list[Backend]:
    """The available backends that compute exactly what is asked and need no options, by priority."""
    _discover()
    usable = [
        cls
        for cls in _backends.values()
        if cls.capabilities.exact and not cls.required_options() and _unavailable(cls) is None
    ]
    return [cls() for cls in sorted(usable, key=lambda cls: (-cls.priority, cls.name))]


def choose_for(attention: Attention, probabilities: bool = False) -> Choice:
    """What ``auto`` takes for an attention: see :func:`choose`.

    Raises:
        BackendRefusedError: every backend refuses, or was found to be wrong; all reasons of all of them are listed.
        InvalidArgumentError: ``ATTNZOO_AUTO`` has a value it cannot have.
    """
    request = attention.request(probabilities)
    because = by_priority_because()
    if because is not None:
        return choose(request, because=because)
    return choose(request, size_class(attention), environment_of(attention.query.device))


@lru_cache(maxsize=4096)
def choose(
    request: Request,
    size: SizeClass | None = None,
    environment: Environment | None = None,
    because: str = "no size was given",
) -> Choice:
    """What ``auto`` takes: of the available exact backends that refuse nothing, the fastest that was measured.

    Where nothing was measured, the one of highest priority that was not found to be wrong.

    Args:
        request: what is asked.
        size: its size class; None: go by priority, whatever was measured.
        environment: the device and versions it runs on; given with the size.
        because: why to go by priority, where it is not by size.

    Raises:
        BackendRefusedError: every backend refuses, or was found to be wrong; all reasons of all of them are listed.
    """
    takes = candidates(request)
    wrong: dict[str, str] = {}
    if size is not None and environment is not None:
        because = f"nothing measured for {mode_of(request.grad)} at {size}; attnzoo.tune measures"
        measurement = cache.find(environment, key_of(request, size))
        if measurement is not None:
            measured = by_measurement(measurement, takes)
            if measured is not None:
                return measured
            wrong = wrongs(measurement, takes)
    right = [backend for backend in takes if backend.name not in wrong]
    if right:
        return Choice(right[0], "the only one that refuses nothing" if len(takes) == 1 else f"by priority: {because}")
    refused = {f"backend {backend.name!r}": backend.refusals(request) for backend in exact_backends()}
    for name, reason in wrong.items():
        refused[f"backend {name!r}"] = (Refusal("measured", reason, "what agrees with the oracle; attnzoo tune"),)
    raise BackendRefusedError("auto", refused, {})
