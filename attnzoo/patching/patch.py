"""Patching a model's attention in place: per instance, reversible, stackable, all or nothing."""

from __future__ import annotations

import fnmatch
import itertools
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError, PatchError, shorten
from attnzoo.patching import engines
from attnzoo.patching.forwards import Patch, PatchedForward, patches_of
from attnzoo.patching.plan import BUILT_IN, check_plans, plan_sites
from attnzoo.patching.site_table import table
from attnzoo.patching.sites import PatchTarget, Site, find_sites
from attnzoo.registry import registry

_patch_numbers = itertools.count(1)


@dataclass(eq=False)
class Handle:
    """A patch in place. Prints as a table. As a context manager it removes the patch on leaving.

    Attributes:
        sites: one :class:`Site` per patched module.
    """

    sites: tuple[Site, ...]
    forwards: tuple[PatchedForward, ...] = field(repr=False)

    @property
    def active(self) -> bool:
        """Whether the patch is in place."""
        return any(forward in patches_of(forward.module) for forward in self.forwards if forward.module is not None)

    def remove(self) -> None:
        """Restore the original forwards exactly. Does nothing if the patch was removed already.

        Copies of patched modules that have become part of the model (PEFT's ``modules_to_save``) are restored, too.

        Raises:
            PatchError: a later patch is on top (the last patch comes off first), or something else has replaced a
                patched forward since. Nothing is changed then.
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
    """Every patched forward in a model, each with its module."""
    return [(module, forward) for module in model.modules() for forward in patches_of(module)]


def _remove(places: list[tuple[nn.Module, PatchedForward]]) -> None:
    for module, forward in places:
        layers = list(patches_of(module))
        if forward not in layers:
            raise PatchError(
                f"{forward.site.label}: got a module whose forward is not this patch's; allowed: to remove a patch "
                "while nothing else has replaced the forward since"
            )
        if layers[0] is not forward:
            raise PatchError(
                f"{forward.site.label}: got a patch with a later one on top; allowed: to remove the last patch first "
                "(last in, first out)"
            )
    for module, forward in places:
        forward.take_off(module)


def is_patched(model: nn.Module) -> bool:
    """Return whether a model is patched.

    Raises:
        InvalidArgumentError: not a module.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> model = GPTNeoXModel(GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> is_patched(model)
        False
        >>> with patch(model, "sdpa"):
        ...     is_patched(model)
        True
    """
    return bool(_layers(_checked(model)))


def handle(model: nn.Module) -> Handle:
    """Return the handle of the last patch of a model. A deep copy of a patched model has a separate handle.

    Args:
        model: a patched model.

    Returns:
        A :class:`Handle` with the same sites as the handle from :func:`patch`.

    Raises:
        InvalidArgumentError: not a module.
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


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError("model", type(model).__name__, "a torch.nn.Module")
    return model


def _last(model: nn.Module) -> list[tuple[nn.Module, PatchedForward]]:
    """The forwards of the last patch of a model, each with its module."""
    layers = _layers(_checked(model))
    if not layers:
        raise PatchError(f"model: got {type(model).__name__}, which is not patched; allowed: a patched model")
    number = max(forward.patch.number for _, forward in layers)
    return [(module, forward) for module, forward in layers if forward.patch.number == number]


def unpatch(model: nn.Module) -> None:
    """Remove the last patch of a model, exactly. Works on copies of a patched model too.

    Raises:
        InvalidArgumentError: not a module.
        PatchError: the model is not patched, or its last patch is no longer in place at every module.

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
    """Raise unless a patch is in place at every module; ``places`` are its forwards in a model."""
    in_place = {forward.site.name for _, forward in places}
    # A shallow copy of a part was not patched itself, and does not count.
    expected = [name for module, forward in places if module is forward.module for name in forward.patch.names]
    lost = [name or "the model that was patched" for name in dict.fromkeys(expected) if name not in in_place]
    if lost:
        raise PatchError(
            f"model: got a model whose last patch is no longer in place at {shorten(', '.join(lost))}; allowed: the "
            "whole model that was patched, while nothing else has replaced a patched forward"
        )


def unpatch_all(model: nn.Module) -> None:
    """Remove every patch of a model; raise :class:`PatchError` and remove none if one cannot be removed."""
    layers = _layers(model)
    numbers = sorted({forward.patch.number for _, forward in layers}, reverse=True)
    for number in numbers:
        _check_whole([(module, forward) for module, forward in layers if forward.patch.number == number])
    for _ in numbers:
        unpatch(model)


def patch(
    model: nn.Module,
    backend: str | Backend | Mapping[str, str | Backend] = "auto",
    *,
    fallback: Literal["error", "native"] = "error",
    replace: bool = False,
    **options: Any,
) -> Handle:
    """Replace the attention of a model, in place.

    Args:
        model: a Hugging Face model of a family with an adapter (see ``attnzoo doctor``), or a part of one.
        backend: a backend name or alias, ``"auto"`` (selects the fastest measured backend per attention, or the
            supporting one of highest priority), ``"native"`` (the model's own code, counted), a configured
            :class:`Backend`, or ``{glob over module names: any of these}``. The first glob that matches a module
            decides, so narrower globs come first. Modules that no glob matches stay as they are.
        fallback: what happens to a call that the backend refuses. ``"error"``: it raises. ``"native"``: that forward
            runs the model's own code, and ``Site.fallbacks`` counts it. Some refusals show only inside the forward (a
            mask that is more than causality and padding). There, a site whose attention function alone is replaced
            falls back. A site whose whole forward is replaced raises, because its cache may be filled already.
        replace: remove the patches that are in place once the new one is known to succeed, so that a notebook cell can
            run again. Otherwise patches stack.
        options: options of the named backends, e.g. ``window=1024``. Configured backends
            (:func:`attnzoo.configure`) keep theirs.

    Returns:
        A :class:`Handle`. Weights, state_dict, config and every other model stay untouched.

    Raises:
        InvalidArgumentError, UnknownNameError: a bad argument.
        PatchError: no site is reached, or a glob reaches none, or stands behind a wider one; or weights are not loaded.
        DriftError: the model's code differs from what the adapter was verified against.
        BackendRefusedError: a backend refuses what a site will request (unless ``fallback="native"``).
        After any of these the model is unchanged.

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
    if replace:
        unpatch_all(model)
    new_patch = Patch(next(_patch_numbers), weakref.ref(model), [plan.target.name for plan in plans])
    forwards = tuple(PatchedForward(new_patch, plan, fallback == "native") for plan in plans)
    for forward in forwards:
        forward.put()
    new_patch.guarded.extend(map(weakref.ref, engines.guard(model)))
    return Handle(tuple(forward.site for forward in forwards if forward.point.attends), forwards)


def _assign(
    sites: list[PatchTarget], backend: str | Backend | Mapping[str, str | Backend]
) -> dict[PatchTarget, str | Backend]:
    """The requested backend of each site in the patch."""
    if isinstance(backend, (str, Backend)):
        return dict.fromkeys(sites, backend)
    pairs = backend.items() if isinstance(backend, Mapping) else ()
    if not pairs or not all(isinstance(glob, str) and isinstance(name, (str, Backend)) for glob, name in pairs):
        raise InvalidArgumentError("backend", repr(backend), "a name, or {glob over module names: name}")
    matched: dict[str, list[PatchTarget]] = {}
    for glob in backend:
        matched[glob] = [site for site in sites if fnmatch.fnmatchcase(site.name, glob)]
        if not matched[glob]:
            names = [site.name for site in sites]
            raise PatchError(f"backend: got glob {glob!r}, which matches no site; allowed: a glob for some of {names}")
        for first in [other for other in matched if other != glob]:
            # A glob that matches the text of the earlier one is wider, and stands for the remaining sites.
            if set(matched[glob]) <= set(matched[first]) and not fnmatch.fnmatchcase(first, glob):
                raise PatchError(
                    f"backend: got glob {glob!r} behind {first!r}, which matches all its sites and decides first; "
                    "allowed: narrower globs before wider ones"
                )
    deciding = {site: glob for glob in reversed(matched) for site in matched[glob]}
    return {site: backend[deciding[site]] for site in sites if site in deciding}


def _configure(requested: Iterable[str | Backend], options: Mapping[str, Any]) -> dict[str | Backend, Backend]:
    """The configured backend of each requested one. Options go to the backends that are named."""
    requested = tuple(dict.fromkeys(requested))
    named = [name for name in requested if isinstance(name, str) and name not in BUILT_IN]
    if options and not named:
        got = f"{sorted(options)} with backend {', '.join(map(repr, requested))}"
        raise InvalidArgumentError("options", got, "options of a named backend")
    configured = {name: registry.configure(name, **options) for name in named}
    return {name: name if isinstance(name, Backend) else {**BUILT_IN, **configured}[name] for name in requested}
