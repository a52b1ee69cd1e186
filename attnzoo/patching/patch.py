"""Patching a model's attention in place: per instance, reversible, stackable, all or nothing."""

from __future__ import annotations

import fnmatch
import itertools
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from torch import nn

from attnzoo.auto import selection
from attnzoo.auto.choice import by_priority_because
from attnzoo.backend import Backend
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, PatchError, Refusal, shorten
from attnzoo.functional import negotiate
from attnzoo.originals import slots
from attnzoo.patching import engines
from attnzoo.patching.forwards import Patch, PatchedForward, patches_of
from attnzoo.patching.site_table import table
from attnzoo.patching.sites import (
    PatchTarget,
    Site,
    check_loaded,
    check_options,
    expected_changes,
    expected_requests,
    find_sites,
)
from attnzoo.registry import RESERVED_NAMES, registry
from attnzoo.spec.segments import Request

_patch_numbers = itertools.count(1)
_Assigned = tuple[PatchTarget, str | Backend]


@dataclass(eq=False)
class Handle:
    """A patch in place. Prints as a table; a context manager that removes the patch on leaving, if it still is.

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
        """Put the original forwards back, exactly. Does nothing if that was done already.

        Copies of patched modules that are now part of the model (PEFT's ``modules_to_save``) get theirs back, too.

        Raises:
            PatchError: a later patch is on top (patches come off last in, first out), or something else has replaced a
                patched forward since; nothing is changed then.
        """
        if all(forward.removed for forward in self.forwards):
            return
        number, root = self.forwards[0].patch.number, self.forwards[0].patch.root()
        places = {(id(f.module), f): (f.module, f) for f in self.forwards if f.module is not None}
        if root is not None:
            places |= {(id(module), f): (module, f) for module, f in _layers(root) if f.patch.number == number}
        _remove(list(places.values()))
        for model in (root, *(guarded() for guarded in self.forwards[0].patch.guarded)):
            if model is not None:
                engines.guard(model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __str__(self) -> str:
        return table(self.sites)


def _layers(model: nn.Module) -> list[tuple[nn.Module, PatchedForward]]:
    """Every patched forward in a model, with the module it sits in."""
    return [(module, forward) for module in model.modules() for forward in patches_of(module)]


def _remove(places: list[tuple[nn.Module, PatchedForward]]) -> None:
    for module, forward in places:
        layers = list(patches_of(module))
        if forward not in layers:
            raise PatchError(
                f"{forward.site.label}: got a module whose forward is not this patch's; allowed: removing a patch "
                "while nothing else has replaced the forward since"
            )
        if layers[0] is not forward:
            raise PatchError(
                f"{forward.site.label}: got a patch with a later one on top; allowed: removing them last in, first out"
            )
    for module, forward in places:
        forward.take_off(module)


def is_patched(model: nn.Module) -> bool:
    """Whether a patch is in place in a model.

    Raises:
        InvalidArgumentError: not a module.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=9)
        >>> model = GPTNeoXModel(GPTNeoXConfig(**sizes))
        >>> is_patched(model)
        False
        >>> with patch(model, "sdpa"):
        ...     is_patched(model)
        True
    """
    return bool(_layers(_checked(model)))


def handle(model: nn.Module) -> Handle:
    """The handle of the last patch of a model: of a deep copy, of the copy's own.

    Args:
        model: a patched model.

    Returns:
        A :class:`Handle` with the same sites as the handle from :func:`patch`.

    Raises:
        InvalidArgumentError: not a module.
        PatchError: the model is not patched.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=9)
        >>> model = GPTNeoXModel(GPTNeoXConfig(**sizes))
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
    """The forwards of the last patch of a model, with the modules they sit in."""
    layers = _layers(_checked(model))
    if not layers:
        raise PatchError(f"model: got {type(model).__name__}, which is not patched; allowed: a patched model")
    number = max(forward.patch.number for _, forward in layers)
    return [(module, forward) for module, forward in layers if forward.patch.number == number]


def unpatch(model: nn.Module) -> None:
    """Remove the last patch of a model, exactly. Works on copies of a patched model too.

    Raises:
        InvalidArgumentError: not a module.
        PatchError: the model is not patched, or its last patch is not in place everywhere any more.
    """
    places = _last(model)
    _check_whole(places)
    _remove(places)
    engines.guard(model)


def _check_whole(places: list[tuple[nn.Module, PatchedForward]]) -> None:
    """Raise unless a patch is in place everywhere: ``places`` are its forwards in a model."""
    in_place = {forward.site.name for _, forward in places}
    # A shallow copy of a part is not what was patched, and stands alone.
    expected = [name for module, forward in places if module is forward.module for name in forward.patch.names]
    lost = [name or "the model that was patched" for name in dict.fromkeys(expected) if name not in in_place]
    if lost:
        raise PatchError(
            f"model: got one in which the last patch is no longer in place at {shorten(', '.join(lost))}; allowed: the "
            "whole model that was patched, while nothing else has replaced a patched forward"
        )


def unpatch_all(model: nn.Module) -> None:
    """Remove every patch of a model, if there is any: all of them, or none if one cannot be removed.

    Raises:
        PatchError: a patch is not in place everywhere any more, or belongs to a larger model.
    """
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
    """Replace how a model attends, in place.

    Args:
        model: a Hugging Face model of a family with an adapter (see ``attnzoo doctor``), or a part of one.
        backend: a backend name or alias, ``"auto"`` (the best that refuses nothing), ``"native"`` (the model's own
            code, counted), or ``{glob over module names: name}``: the first glob that matches decides, so that
            narrower ones come first; modules that none matches stay as they are. A configured :class:`Backend` may
            stand for its name.
        fallback: ``"error"``: what the backend cannot do raises; ``"native"``: that forward runs the model's own
            code and returns what that returns; it is counted in ``Site.fallbacks``. Some refusals show only
            inside the forward (a mask that is more than causality and padding). Where the attention function is all
            that is replaced, they fall back. Where the whole forward is, they raise, as its cache may be filled.
        replace: remove the patches that are in place, once it is clear that the new one can be made. A notebook cell
            that patches can then run again. Otherwise patches stack.
        options: go to the backends that are named, e.g. ``window=1024``; a configured one (:func:`attnzoo.configure`)
            has its own.

    Returns:
        A :class:`Handle`. Weights, state_dict, config and every other model stay untouched.

    Raises:
        InvalidArgumentError, UnknownNameError: a bad argument.
        PatchError: no site is reached, or none by one of the globs, or one stands behind a wider one; or weights are
            not loaded yet.
        DriftError: the model's code is not what the adapter was verified against.
        BackendRefusedError: a site will ask what the backend cannot do (unless ``fallback="native"``).
        Whatever is raised, nothing was changed.
    """
    if fallback not in ("error", "native"):
        raise InvalidArgumentError("fallback", repr(fallback), "'error' or 'native'")
    everything = find_sites(model)
    chosen = _assign([found for found in everything if found.point.attends], backend)
    if any(name == "auto" for _, name in chosen):
        by_priority_because()  # raises if what it goes by is told wrongly
    made = _make(dict.fromkeys(name for _, name in chosen), options)
    companions = _companions(everything, chosen)
    made |= dict.fromkeys((name for _, name in companions), None)
    chosen += companions
    refused: dict[str, tuple[Refusal, ...]] = {}
    alternatives: dict[str, tuple[str, ...]] = {}
    refusers: list[str] = []
    for found, name in chosen:
        if name != "native":
            found.adapter.check_drift(found.point, found.module)
            check_forward(found)
            found.point.check(found.module)
    check_loaded(model, (found for found, name in chosen if name != "native"))
    settled = _settle(chosen, made)
    for found, name in chosen:
        instance = settled[found.name]
        if fallback != "error" or name == "native":
            continue
        asked = expected_requests(found)
        if instance is None:
            for where, reasons in _nobody_takes(asked).items():
                refusers.append("auto")
                refused[f"{found.name}, {where}"] = reasons
            continue
        if not asked and (missing := registry.availability(instance)):
            refusers.append(instance.name)
            refused[found.name] = missing
            alternatives[found.name] = tuple(other.name for other in registry.exact_backends())
        for request in asked:
            try:
                negotiate(instance, request, found.name)
            except BackendRefusedError as error:
                refusers.append(error.backend)
                for where, reasons in error.refusals.items():
                    refused[where] = tuple(dict.fromkeys((*refused.get(where, ()), *reasons)))
                    others = alternatives.get(where, error.alternatives[where])
                    alternatives[where] = tuple(name for name in others if name in error.alternatives[where])
    if refused:
        raise BackendRefusedError(", ".join(dict.fromkeys(refusers)), refused, alternatives)
    if replace:
        unpatch_all(model)
    made_patch = Patch(next(_patch_numbers), weakref.ref(model), [found.name for found, _ in chosen])
    forwards: list[PatchedForward] = []
    for found, name in chosen:
        cls = type(found.module).__name__
        instance = settled[found.name]
        shown = instance.name if instance is not None else str(name)
        changes = () if instance is None else expected_changes(instance, expected_requests(found))
        site = Site(found.name, cls, found.point.describe(found.module), shown, changes)
        native, falls = name == "native", fallback == "native"
        forwards.append(PatchedForward(made_patch, found, site, instance, native, falls))
    for forward in forwards:
        forward.put()
    made_patch.guarded.extend(map(weakref.ref, engines.guard(model)))
    return Handle(tuple(forward.site for forward in forwards if forward.point.attends), tuple(forwards))


def _nobody_takes(requests: tuple[Request, ...]) -> dict[str, tuple[Refusal, ...]]:
    """Why ``auto`` has nothing to choose from, by backend; empty where it has."""
    try:
        for request in requests:
            selection.choose(request)
    except BackendRefusedError as error:
        return error.refusals
    return {}


def _settle(chosen: list[_Assigned], made: Mapping[str | Backend, Backend | None]) -> dict[str, Backend | None]:
    """The backend of every site by name, as it serves that site."""
    settled: dict[str, Backend | None] = {found.name: None for found, _ in chosen}
    for name, instance in made.items():
        if instance is None:
            continue
        asked = {found.name: expected_requests(found) for found, other in chosen if other == name}
        together = tuple(request for requests in asked.values() for request in requests)
        serving = {site: instance.bind_to_site(requests, together) for site, requests in asked.items()}
        check_options(serving.values())
        settled.update(serving)
    return settled


def _companions(everything: list[PatchTarget], chosen: list[_Assigned]) -> list[_Assigned]:
    """Modules that attend nothing, and are taken over because a module inside them, or beside them, is."""
    inside = [found.module for found, name in chosen if name != "native"]
    return [
        (found, "auto")
        for found in everything
        if not found.point.attends and any(module in inside for module in (found.owner or found.module).modules())
    ]


def check_forward(found: PatchTarget) -> None:
    """Refuse to bypass a forward that somebody put on the instance.

    Raises:
        PatchError: the module's forward is neither its class's nor a patch of ours.
    """
    if slots.is_foreign(found.module):
        forward = shorten(repr(slots.current(found.module)))
        raise PatchError(
            f"{found.name}: got a module whose forward was replaced by {forward}; allowed: the class's "
            "own forward (accelerate's hooks may be around it), or attnzoo's patches"
        )


def _assign(sites: list[PatchTarget], backend: str | Backend | Mapping[str, str | Backend]) -> list[_Assigned]:
    if isinstance(backend, (str, Backend)):
        return [(found, backend) for found in sites]
    pairs = backend.items() if isinstance(backend, Mapping) else ()
    if not pairs or not all(isinstance(glob, str) and isinstance(name, (str, Backend)) for glob, name in pairs):
        raise InvalidArgumentError("backend", repr(backend), "a name, or {glob over module names: name}")
    names = [found.name for found in sites]
    matched: dict[str, set[str]] = {}
    for glob in backend:
        matched[glob] = {name for name in names if fnmatch.fnmatchcase(name, glob)}
        if not matched[glob]:
            raise PatchError(f"backend: got glob {glob!r}, which matches no site; allowed: one that does of {names}")
        for first in [one for one in matched if one != glob]:
            if matched[glob] <= matched[first] and not fnmatch.fnmatchcase(first, glob):  # then it is for the rest
                raise PatchError(
                    f"backend: got glob {glob!r} behind {first!r}, which matches all its sites and decides first; "
                    "allowed: narrower globs before wider ones"
                )
    return [
        (found, name)
        for found in sites
        for name in [next((name for glob, name in backend.items() if found.name in matched[glob]), None)]
        if name is not None
    ]


def _make(names: Iterable[str | Backend], options: Mapping[str, Any]) -> dict[str | Backend, Backend | None]:
    """The configured backends behind names; None for ``auto`` and ``native``. Options are for those that are named."""
    named = [name for name in names if isinstance(name, str) and name not in RESERVED_NAMES]
    if options and not named:
        got = f"{sorted(options)} with backend {', '.join(dict.fromkeys(map(repr, names)))}"
        raise InvalidArgumentError("options", got, "options of a named backend")
    configured = {name: registry.configure(name, **options) for name in named}
    return {name: name if isinstance(name, Backend) else configured.get(name) for name in names}
