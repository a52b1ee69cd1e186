"""The registry maps backend names to backend classes, and model types to adapters.

Backends and adapters are registered by entry points (groups ``attnzoo.backends`` and ``attnzoo.adapters``) or by a
call. The backends and adapters of attnzoo also use entry points. The registry loads entry points on first use. If
loading fails, the registry raises nothing, and ``attnzoo doctor`` shows the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from attnzoo import errors
from attnzoo.backend import Backend, BackendInfo
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, Refusal, UnknownNameError, raise_interrupts
from attnzoo.refusal_cache import RefusalCache, availability, unavailable_reason

if TYPE_CHECKING:
    from attnzoo.adapter import Adapter
    from attnzoo.spec.segments import Request

RESERVED_NAMES = ("auto", "native")
ANY_MODEL_TYPE = "*"  # the model type of an adapter that serves modules of any model
BACKEND_GROUP, ADAPTER_GROUP = "attnzoo.backends", "attnzoo.adapters"

_BackendType = TypeVar("_BackendType", bound=type[Backend])


class Registry:
    """A collection of backends by name and of adapters by model type.

    The process uses one registry, :data:`registry`. Tests activate other registries with :meth:`replaced_by`.

    Attributes:
        generation: an integer that grows with every change. Callers put this integer into their cache keys.
    """

    def __init__(self, discover: bool = True) -> None:
        """Create an empty registry. If ``discover`` is True, load entry points of backends on first use."""
        self.generation = 0
        self._discover_entry_points = discover
        self._lock = threading.RLock()
        self._backends: dict[str, type[Backend]] = {}
        self._adapters: dict[str, Adapter] = {}
        self._adapter_entries: tuple[metadata.EntryPoint, ...] | None = None
        self._variants: dict[str, Backend] = {}
        self._broken_backends: dict[str, str] = {}
        self._broken_adapters: dict[str, str] = {}
        self._refusals = RefusalCache()

    def copy(self) -> Registry:
        """Return an independent registry with the same content. The copy loads no further entry points of backends."""
        self._discover()
        twin = Registry(discover=False)
        for name in ("_backends", "_adapters", "_variants", "_broken_backends", "_broken_adapters"):
            setattr(twin, name, dict(getattr(self, name)))
        return twin

    @contextmanager
    def replaced_by(self, other: Registry) -> Iterator[Registry]:
        """Context manager that replaces the content of this registry by the content of ``other``."""
        before = dict(vars(self))
        vars(self).update(vars(other), generation=before["generation"] + 1)
        try:
            yield self
        finally:
            vars(self).update(before, generation=self.generation + 1)

    def forget(self) -> None:
        """Clear all caches. Call this method after the content or the installed packages have changed."""
        self.generation += 1
        self._adapter_entries = None
        self._refusals.clear()

    # Backends

    def _discover(self) -> None:
        with self._lock:
            if not self._discover_entry_points:
                return
            self._discover_entry_points = False
            for entry in metadata.entry_points(group=BACKEND_GROUP):
                try:
                    cls = entry.load()
                    if entry.name not in self._backends:  # the import may already have registered the class
                        self.register_backend(cls)
                except BaseException as error:
                    raise_interrupts(error)
                    if entry.name not in self._backends:
                        self._broken_backends[entry.name] = _failure(entry, error)

    def register_backend(self, cls: _BackendType, *, replace: bool = False) -> _BackendType:
        """Register a backend class and return the class. This function can be used as a decorator.

        Args:
            cls: a subclass of :class:`attnzoo.Backend` that sets ``name``.
            replace: whether the class may replace a backend that already has the same name.

        Raises:
            InvalidArgumentError: ``cls`` is not a backend class, or a name of the class is already used or reserved.

        Example:
            >>> import attnzoo
            >>> @attnzoo.register_backend
            ... class Mine(attnzoo.Backend):
            ...     name = "mine"
            >>> attnzoo.unregister_backend("mine")
        """
        if not (isinstance(cls, type) and issubclass(cls, Backend) and cls.name):
            raise InvalidArgumentError("cls", repr(cls), "a subclass of attnzoo.Backend with a name")
        self._discover()
        with self._lock:
            others = [other for other in self._backends.values() if other is not cls]
            taken = {name for other in others for name in (other.name, *other.aliases)}
            taken = ({*RESERVED_NAMES, *self._variants}) if replace else {*taken, *RESERVED_NAMES, *self._variants}
            for name in (cls.name, *cls.aliases):
                if name in taken:
                    raise InvalidArgumentError("backend name", repr(name), f"a name other than {sorted(taken)}")
            self._backends.pop(cls.name, None)  # move the class to the end: the last class gets a shared name
            self._backends[cls.name] = cls
            self._broken_backends.pop(cls.name, None)
            self.forget()
        return cls

    def unregister_backend(self, name: str) -> None:
        """Remove a backend from the registry. Models that are patched with the backend continue to use it.

        Raises:
            UnknownNameError: no backend with this name is registered.

        Example:
            >>> import attnzoo
            >>> cls = attnzoo.register_backend(type("Mine", (attnzoo.Backend,), {"name": "mine"}))
            >>> attnzoo.unregister_backend("mine")
        """
        cls = self.backend_class(name)
        with self._lock:
            del self._backends[cls.name]
            self.forget()

    def backend_classes(self) -> tuple[type[Backend], ...]:
        """Return every registered backend class, in the order of registration."""
        self._discover()
        return tuple(self._backends.values())

    def backends(self) -> dict[str, BackendInfo]:
        """Return a :class:`BackendInfo` for every registered backend, by name.

        Example:
            >>> import attnzoo
            >>> attnzoo.backends()["sdpa"].available
            True
        """
        infos = {}
        for cls in self.backend_classes():
            reason = unavailable_reason(cls)
            can, aliases, available = cls.capabilities, self._aliases(cls), reason is None
            infos[cls.name] = BackendInfo(cls.name, aliases, available, reason or "", can.exact, can, cls.options())
        for name, reason in self._broken_backends.items():
            infos[name] = BackendInfo(name, (), False, reason, False, None)
        return dict(sorted(infos.items()))

    def _owner(self, name: str) -> type[Backend] | None:
        """Return the last registered backend with this name or alias."""
        return next((cls for cls in reversed(self._backends.values()) if name in (cls.name, *cls.aliases)), None)

    def _aliases(self, cls: type[Backend]) -> tuple[str, ...]:
        return tuple(alias for alias in cls.aliases if self._owner(alias) is cls)

    def backend_class(self, name: str) -> type[Backend]:
        """Return the backend class for a name or alias.

        Raises:
            InvalidArgumentError: the name is ``"auto"`` or ``"native"``, or the name of a backend that failed to load.
            UnknownNameError: the name is not registered. The message suggests similar names.
        """
        self._discover()
        text = name if isinstance(name, str) else ""  # comparing an array with a name would raise
        owner = type(self._variants[text]) if text in self._variants else self._owner(text)
        if owner is not None:
            return owner
        if text in self._broken_backends:
            raise InvalidArgumentError("backend", f"{text!r}: {self._broken_backends[text]}", "a backend that loads")
        raise errors.unusable_backend(name, self.names(), RESERVED_NAMES)

    def names(self) -> set[str]:
        """Return every name that users may type for a backend: names, aliases, variants and the reserved names."""
        self._discover()
        known = {alias for cls in self._backends.values() for alias in (cls.name, *self._aliases(cls))}
        return {*known, *self._variants, *RESERVED_NAMES}

    def configure(self, name: str, **options: Any) -> Backend:
        """Return a configured backend, which functions accept in place of a backend name.

        Args:
            name: the name or alias of a backend, or the name of a variant.
            options: options of that backend, e.g. ``window=1024``. :func:`attnzoo.backends` lists the option names. A
                variant has all its options already.

        Raises:
            UnknownNameError: the backend or an option is unknown.
            InvalidArgumentError: a required option is missing, or a value is not allowed.

        Example:
            >>> import attnzoo
            >>> attnzoo.configure("blocked-local", window=64, sinks=4).window
            64
        """
        cls = self.backend_class(name)
        variant = self._variants.get(name)
        if variant is not None:
            if options:
                raise InvalidArgumentError(f"options of variant {name!r}", sorted(options), f"none, as in {variant}")
            return variant
        for option in options:
            if option not in cls.options():
                raise UnknownNameError(f"option of backend {cls.name!r}", option, cls.options())
        missing = [option for option in cls.required_options() if option not in options]
        if missing:
            got = f"no value for {', '.join(missing)}"
            raise InvalidArgumentError(f"options of backend {cls.name!r}", got, f"values, e.g. {missing[0]}=...")
        return cls(**options)

    # Variants: names for configured backends

    def register_variant(self, name: str, backend: Backend) -> Backend:
        """Register a name for a configured backend, and return the backend.

        Raises:
            InvalidArgumentError: another backend or variant has this name.
        """
        with self._lock:
            taken = self.names()
            if name in taken and self._variants.get(name) != backend:
                raise InvalidArgumentError("variant name", repr(name), f"a name other than {sorted(taken)}")
            self._variants[name] = backend
            self.forget()
        return backend

    def unregister_variant(self, name: str) -> None:
        """Remove the name of a variant.

        Raises:
            UnknownNameError: no variant has this name.
        """
        with self._lock:
            if name not in self._variants:
                raise UnknownNameError("variant", name, self._variants)
            del self._variants[name]
            self.forget()

    def variants(self) -> dict[str, Backend]:
        """Return the configured backend of each variant, by name."""
        return dict(self._variants)

    # Adapters

    def register_adapter(self, adapter: Adapter, *, replace: bool = False) -> Adapter:
        """Register the adapter of one or more model types, and return the adapter.

        Args:
            adapter: the description of the attention modules of a model family.
            replace: whether the adapter may replace the adapter of a model type.

        Raises:
            InvalidArgumentError: ``adapter`` is not an adapter, or a model type already has another adapter.

        Example:
            >>> import attnzoo
            >>> adapter = attnzoo.register_adapter(attnzoo.Adapter(model_types=("mine",), points=()))
            >>> attnzoo.unregister_adapter("mine")
        """
        from attnzoo.adapter import Adapter

        if not isinstance(adapter, Adapter):
            raise InvalidArgumentError("adapter", repr(adapter), "an attnzoo.Adapter")
        with self._lock:
            for model_type in adapter.model_types:
                if not replace and self._adapters.get(model_type, adapter) is not adapter:
                    allowed = "a model type without an adapter, or replace=True"
                    raise InvalidArgumentError("model_type", repr(model_type), allowed)
            for model_type in adapter.model_types:
                self._adapters[model_type] = adapter
            self.forget()
        return adapter

    def unregister_adapter(self, model_type: str) -> None:
        """Remove the adapter of a model type. An adapter with an entry point is loaded again on the next use.

        Raises:
            UnknownNameError: the model type has no registered adapter.

        Example:
            >>> import attnzoo
            >>> adapter = attnzoo.register_adapter(attnzoo.Adapter(model_types=("mine",), points=()))
            >>> attnzoo.unregister_adapter("mine")
        """
        with self._lock:
            if self._adapters.pop(model_type, None) is None:
                raise UnknownNameError("model_type", model_type, self._adapters)
            self.forget()

    def find_adapter(self, model_type: str) -> Adapter | None:
        """Return the adapter of a transformers ``config.model_type``, or None if no adapter can be loaded."""
        with self._lock:
            if model_type in self._adapters:
                return self._adapters[model_type]
            entries = [entry for entry in self._entries_of_adapters() if entry.name == model_type]
            return next((adapter for entry in entries if (adapter := self._load_adapter(entry)) is not None), None)

    def adapters(self) -> dict[str, Adapter]:
        """Load all entry points, and return every adapter by model type. Entry points that fail to load are omitted."""
        with self._lock:
            for entry in self._entries_of_adapters():
                if entry.name not in self._adapters:
                    self._load_adapter(entry)
            return dict(self._adapters)

    def _entries_of_adapters(self) -> tuple[metadata.EntryPoint, ...]:
        """Return the entry points of adapters. Reading is slow: each installed package has its own file of them."""
        if self._adapter_entries is None:
            self._adapter_entries = tuple(metadata.entry_points(group=ADAPTER_GROUP))
        return self._adapter_entries

    def _load_adapter(self, entry: metadata.EntryPoint) -> Adapter | None:
        try:
            adapter = self.register_adapter(entry.load())
        except BaseException as error:
            raise_interrupts(error)
            self._broken_adapters[entry.name] = _failure(entry, error)
            return None
        self._broken_adapters.pop(entry.name, None)
        return adapter

    def broken_adapters(self) -> dict[str, str]:
        """Return ``{model type: reason}`` for adapters whose entry point failed to load at the last attempt."""
        return dict(self._broken_adapters)

    def model_types(self) -> tuple[str, ...]:
        """Return every model type that has an adapter or an entry point of an adapter."""
        return tuple(sorted({*self._adapters, *(entry.name for entry in self._entries_of_adapters())}))

    # Support on this machine

    def refusals(self, backend: Backend, request: Request) -> tuple[Refusal, ...]:
        """Return why a backend cannot run a request on this machine. :meth:`forget` clears the cached results."""
        return self._refusals.get(backend, request)

    def make_backend(self, name: str, **options: Any) -> Backend:
        """Return a configured backend. Raise :class:`BackendRefusedError` if this machine cannot run the backend."""
        backend = self.configure(name, **options)
        if reasons := availability(backend):
            usable = tuple(other.name for other in self.exact_backends())
            raise BackendRefusedError(backend.name, {"this machine": reasons}, {"this machine": usable})
        return backend

    def exact_backends(self) -> tuple[Backend, ...]:
        """Return the available exact backends that need no options, highest priority first."""
        exact = (cls for cls in self.backend_classes() if cls.capabilities.exact and not cls.required_options())
        usable = [cls for cls in exact if unavailable_reason(cls) is None]
        return tuple(cls() for cls in sorted(usable, key=lambda cls: (-cls.priority, cls.name)))

    def supporting_backends(self, request: Request) -> tuple[Backend, ...]:
        """Return the available exact backends that support a request, highest priority for this request first."""
        supporting = (backend for backend in self.exact_backends() if not backend.refusals(request))
        return tuple(sorted(supporting, key=lambda backend: -backend.priority_for(request)))

    def unused_entry_points(self) -> tuple[tuple[str, str], ...]:
        """Return ``(name, reason)`` for each entry point that fails to load, or whose name another object uses."""
        self._discover()
        unused = []
        for group, owners in ((BACKEND_GROUP, self._backends), (ADAPTER_GROUP, self.adapters())):
            for entry in metadata.entry_points(group=group):
                try:
                    if entry.name in owners and entry.load() is not owners[entry.name]:
                        unused.append((entry.name, f"{entry.value} is not used: another object has this name"))
                except BaseException as error:
                    raise_interrupts(error)
                    unused.append((entry.name, _failure(entry, error)))
        return tuple(unused)


def _failure(entry: metadata.EntryPoint, error: BaseException) -> str:
    return f"{entry.value} failed to load: {type(error).__name__}: {error}"


registry = Registry()

# attnzoo exports these functions.
backends = registry.backends
configure = registry.configure
register_backend = registry.register_backend
unregister_backend = registry.unregister_backend
register_adapter = registry.register_adapter
unregister_adapter = registry.unregister_adapter
