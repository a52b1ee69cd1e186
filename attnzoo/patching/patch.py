"""Patch the attention of one model instance in place, and remove patches. A failed patch leaves the model unchanged."""

from __future__ import annotations

import fnmatch
import itertools
import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError, PatchError, shorten
from attnzoo.patching import engines
from attnzoo.patching.forwards import Patch, PatchedForward, patches_of
from attnzoo.patching.plan import BUILT_IN, SitePlan, check_plans, plan_sites
from attnzoo.patching.site_table import table
from attnzoo.patching.sites import PatchTarget, Site, check_model, find_sites
from attnzoo.registry import registry

_patch_numbers = itertools.count(1)


@dataclass(eq=False)
class Handle:
    """The handle of a patch. ``print(handle)`` prints a table. Leaving ``with handle:`` removes the patch.

    Attributes:
        sites: one :class:`Site` per patched attention module.
    """

    sites: tuple[Site, ...]
    forwards: tuple[PatchedForward, ...] = field(repr=False)

    @property
    def active(self) -> bool:
        """Whether the patch is in place."""
        return any(forward in patches_of(forward.module) for forward in self.forwards if forward.module is not None)

    def remove(self) -> None:
        """Restore the original forwards exactly. Do nothing if the patch was already removed.

        Also restore the copies of patched modules inside the model, such as PEFT's copies for ``modules_to_save``.

        Raises:
            PatchError: a module has a later patch, or other code has replaced a patched forward. In both cases, the
                model is unchanged.
        """
        if all(forward.removed for forward in self.forwards):
            return
        patch = self.forwards[0].patch
        root = patch.root()
        places = {(id(f.module), f): (f.module, f) for f in self.forwards if f.module is not None}
        if root is not None:
            places |= {(id(module), f): (module, f) for module, f in _layers(root) if f.patch.number == patch.number}
        _remove(list(places.values()))
        for model in (root, *(guarded() for guarded in patch.guarded)):
            if model is not None:
                engines.guard(model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __str__(self) -> str:
        return table(self.sites)


def _layers(model: nn.Module) -> list[tuple[nn.Module, PatchedForward]]:
    """Return one pair (module, patched forward) for each patched forward in a model."""
    check_model(model)
    return [(module, forward) for module in model.modules() for forward in patches_of(module)]


def _remove(places: list[tuple[nn.Module, PatchedForward]]) -> None:
    for module, forward in places:
        layers = list(patches_of(module))
        if forward not in layers:
            raise PatchError(
                f"{forward.site.label}: got the removal of a patch whose forward other code has replaced; allowed: "
                "restore the patched forward of the module first"
            )
        if layers[0] is not forward:
            raise PatchError(
                f"{forward.site.label}: got the removal of a patch below a later patch; allowed: remove the later "
                "patch first (last in, first out)"
            )
    for module, forward in places:
        forward.take_off(module)


def is_patched(model: nn.Module) -> bool:
    """Return whether a model is patched.

    Raises:
        InvalidArgumentError: ``model`` is not a ``torch.nn.Module``.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> model = GPTNeoXModel(GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> is_patched(model)
        False
        >>> with patch(model, "sdpa"):
        ...     is_patched(model)
        True
    """
    return bool(_layers(model))


def handle(model: nn.Module) -> Handle:
    """Return the handle of the last patch of a model. A deep copy of a patched model has a separate handle.

    Args:
        model: a patched model.

    Returns:
        A :class:`Handle` with the same sites as the handle from :func:`patch`.

    Raises:
        InvalidArgumentError: ``model`` is not a ``torch.nn.Module``.
        PatchError: the model is not patched.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> model = GPTNeoXModel(GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> sites = patch(model, "sdpa").sites
        >>> handle(model).sites == sites
        True
    """
    forwards = dict.fromkeys(forward for _, forward in _last(model))
    sites = dict.fromkeys(forward.site for forward in forwards if forward.point.attends)
    return Handle(tuple(sites), tuple(forwards))


def _last(model: nn.Module) -> list[tuple[nn.Module, PatchedForward]]:
    """Return one pair (module, patched forward) for each forward of the last patch of a model."""
    layers = _layers(model)
    if not layers:
        raise PatchError(f"model: got {type(model).__name__}, which is not patched; allowed: a patched model")
    number = max(forward.patch.number for _, forward in layers)
    return [(module, forward) for module, forward in layers if forward.patch.number == number]


def unpatch(model: nn.Module) -> None:
    """Remove the last patch of a model or of a copy of a patched model. Restore the earlier forwards exactly.

    Raises:
        InvalidArgumentError: ``model`` is not a ``torch.nn.Module``.
        PatchError: the model is not patched, a module has lost the last patch, or ``model`` is a part of the model that
            was patched.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> model = GPTNeoXModel(GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> handle = patch(model, "sdpa")
        >>> unpatch(model)
        >>> is_patched(model)
        False
    """
    places = _last(model)
    _check_whole(places)
    _remove(places)
    engines.guard(model)


def _check_whole(places: list[tuple[nn.Module, PatchedForward]]) -> None:
    """Raise unless a patch is in place at all its modules. ``places`` are pairs as from :func:`_last`."""
    in_place = {forward.site.name for _, forward in places}
    # Ignore shallow copies, because a patch includes the original modules only.
    expected = [name for module, forward in places if module is forward.module for name in forward.patch.names]
    lost = [name or "the model that was patched" for name in dict.fromkeys(expected) if name not in in_place]
    if lost:
        raise PatchError(
            f"model: got a model whose last patch is no longer in place at {shorten(', '.join(lost))}; allowed: the "
            "whole model that was patched, not a part of it. If other code has replaced a patched forward, restore the "
            "patched forward first"
        )


def unpatch_all(model: nn.Module, numbers: Container[int] | None = None) -> None:
    """Remove the patches of a model that have one of the numbers. None means every patch.

    Raises:
        PatchError: a patch is not in place at all its modules (then no patch is removed), or is below a patch that has
            another number (then later patches are removed).
    """
    by_number: dict[int, list[tuple[nn.Module, PatchedForward]]] = {}
    for module, forward in _layers(model):
        if numbers is None or forward.patch.number in numbers:
            by_number.setdefault(forward.patch.number, []).append((module, forward))
    for places in by_number.values():
        _check_whole(places)
    for number in sorted(by_number, reverse=True):
        _remove(by_number[number])
    engines.guard(model)


def patch(
    model: nn.Module,
    backend: str | Backend | Mapping[str, str | Backend] = "auto",
    *,
    fallback: Literal["error", "native"] = "error",
    replace: bool = False,
    **options: Any,
) -> Handle:
    """Replace the attention of a model, in place. If ``patch`` raises, the model is unchanged.

    Args:
        model: a Hugging Face model of a family with an adapter (see ``attnzoo doctor``), or a part of such a model.
        backend: a backend name or alias, a configured :class:`Backend`, or ``{glob over module names: backend}``.
            ``"auto"`` selects for each call the fastest measured backend, or the model's original code if that is
            faster. Without measurements, backends run only where they are known to be faster. ``"native"`` runs the
            model's original code and counts the calls. The first glob that matches a module decides, so write narrow
            globs first. Modules that match no glob stay unpatched.
        fallback: what happens to a call that the backend refuses. With ``"error"``, the call raises. With
            ``"native"``, the call runs the model's original code, and ``Site.fallbacks`` counts the call. Exception:
            some patches replace the whole forward of a module. A refusal after the start of such a forward always
            raises, because the forward may have filled the cache. An example is the refusal of a mask that is neither
            causal nor padding.
        replace: whether to remove earlier patches of the model, after the new patch has passed all checks. A notebook
            cell with ``replace=True`` can run again. By default, the new patch is added to the earlier patches.
        options: options for backends that are given by name, e.g. ``window=1024``. Configured backends
            (:func:`attnzoo.configure`) ignore these options.

    Returns:
        A :class:`Handle`. Weights, state_dict and config of the model are unchanged.

    Raises:
        InvalidArgumentError, UnknownNameError: an argument is invalid.
        PatchError: the model has no site, a glob matches no site, a wider glob stands before a narrower glob, or
            weights are not loaded.
        DriftError: the model's code differs from the code that the adapter was verified against.
        BackendRefusedError: a backend refuses an expected request of a site and ``fallback`` is ``"error"``.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> model = GPTNeoXModel(GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> with patch(model, "sdpa") as handle:
        ...     [site.name for site in handle.sites]
        ['layers.0.attention']
    """
    if fallback not in ("error", "native"):
        raise InvalidArgumentError("fallback", repr(fallback), "'error' or 'native'")
    targets = find_sites(model)
    assigned = _assign([target for target in targets if target.point.attends], backend)
    configured = _configure(assigned.values(), options)
    plans = plan_sites(model, targets, {target: configured[requested] for target, requested in assigned.items()})
    check_plans(plans, allow_refusals=fallback == "native")
    return put_plans(model, plans, fallback == "native", unpatch_all if replace else None)


def put_plans(
    model: nn.Module,
    plans: Sequence[SitePlan],
    fallback: bool = False,
    remove: Callable[[nn.Module], None] | None = None,
) -> Handle:
    """Patch the modules of a model as planned. If this raises or is interrupted, no module gets the new patch.

    Args:
        plans: plans without obstacles, for the sites and companions of the model.
        fallback: whether calls that a backend refuses run the model's original code.
        remove: called with the model before the new patch is put in place. The function must remove all earlier
            patches of the planned modules. None means that the new patch is added to the earlier patches.
    """
    new_patch = Patch(next(_patch_numbers), weakref.ref(model), [plan.target.name for plan in plans])
    # The code of adapters runs here and may raise, so the earlier patches are still in place.
    forwards = tuple(PatchedForward(new_patch, plan, fallback, remove is not None) for plan in plans)
    if remove is not None:
        remove(model)
    try:
        for forward in forwards:
            forward.put()
        new_patch.guarded.extend(map(weakref.ref, engines.guard(model)))
    except BaseException:  # an interrupt between two modules must not leave half a patch
        for plan, forward in zip(plans, forwards, strict=True):
            if forward in patches_of(plan.target.module):
                forward.take_off(plan.target.module)
        engines.guard(model)
        raise
    return Handle(tuple(forward.site for forward in forwards if forward.point.attends), forwards)


def _assign(
    sites: list[PatchTarget], backend: str | Backend | Mapping[str, str | Backend]
) -> dict[PatchTarget, str | Backend]:
    """Return the requested backend of each site in the patch."""
    if isinstance(backend, (str, Backend)):
        return dict.fromkeys(sites, backend)
    pairs = backend.items() if isinstance(backend, Mapping) else ()
    if not pairs or not all(isinstance(glob, str) and isinstance(name, (str, Backend)) for glob, name in pairs):
        raise InvalidArgumentError("backend", repr(backend), "a backend, or a dict {glob of module names: backend}")
    matched: dict[str, list[PatchTarget]] = {}
    for glob in backend:
        matched[glob] = [site for site in sites if fnmatch.fnmatchcase(site.name, glob)]
        if not matched[glob]:
            names = [site.name for site in sites]
            raise PatchError(f"backend: got glob {glob!r}, which matches no site; allowed: a glob for some of {names}")
        for first in [other for other in matched if other != glob]:
            # If a later glob matches the text of an earlier glob, the later glob is wider and gets the other sites.
            if set(matched[glob]) <= set(matched[first]) and not fnmatch.fnmatchcase(first, glob):
                raise PatchError(
                    f"backend: got glob {glob!r} after {first!r}, but {first!r} matches all sites of {glob!r}; "
                    "allowed: narrower globs before wider globs"
                )
    deciding = {site: glob for glob in reversed(matched) for site in matched[glob]}
    return {site: backend[deciding[site]] for site in sites if site in deciding}


def _configure(requested: Iterable[str | Backend], options: Mapping[str, Any]) -> dict[str | Backend, Backend]:
    """Return ``{requested backend: configured backend}``. ``options`` are for backends requested by name."""
    requested = tuple(dict.fromkeys(requested))
    named = [name for name in requested if isinstance(name, str) and name not in BUILT_IN]
    if options and not named:
        got = f"{sorted(options)} with backend {', '.join(map(repr, requested))}"
        raise InvalidArgumentError(
            "options", got, "no options, unless the backend is given by its name and is not 'auto' or 'native'"
        )
    configured = {name: registry.configure(name, **options) for name in named}
    return {name: name if isinstance(name, Backend) else {**BUILT_IN, **configured}[name] for name in requested}
