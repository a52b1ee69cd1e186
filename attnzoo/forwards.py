"""The forward that sits in a patched module, and what it computes attentions with."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from attnzoo import registry, slots
from attnzoo.backend import Backend
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, PatchError
from attnzoo.functional import compute_dtype, execute, negotiate
from attnzoo.segments import Attention, Result, describe
from attnzoo.sites import Found, Site, expected_requests, trains

T = TypeVar("T")


class SiteAttend:
    """What a seam's forward computes with: a backend, a site to record on, and the patch's per-forward memory."""

    def __init__(self, patched: PatchedForward, memory: WeakTensorKeyDictionary) -> None:
        self.site, self.backend, self._fallback = patched.site, patched.backend, patched.fallback
        self._found, self._memory = patched.found, memory

    @functools.cached_property
    def sharers(self) -> tuple[nn.Module, ...]:
        """The modules the site shares values with, itself among them; of a deep copy, when that is whole."""
        return self._found.sharers

    @property
    def complete(self) -> bool:
        last = [next(patches_of(module), None) for module in self.sharers]
        shared = self._found.owner is not None
        return shared and not any(patched is None or patched.native or patched.fallback for patched in last)

    def __call__(self, attention: Attention, probabilities: bool = False) -> Result:
        backend, choice = self.backend, None
        if backend is None:
            choice = registry.choose_for(attention, probabilities)
            backend = choice.backend
        result = execute(backend, attention, probabilities, self.site.name)
        self.site.kernels[result.kernel] += 1
        changed = None if backend.capabilities.exact else backend.changes(attention.request(probabilities))
        if changed is not None:
            self.site.changed[changed] += 1
        if choice is not None:
            self.site.choices[choice] += 1
        if self.site.observer is not None:
            self.site.observer(self.site, attention, result, backend)
        return result

    def takes(self, attention: Attention) -> bool:
        request = attention.request()
        return bool(registry.takers(request)) if self.backend is None else not registry.refusals(self.backend, request)

    def falls_back(self, can: bool = True) -> bool:
        self.site.fallbacks += self._fallback and can
        return self._fallback and can

    def once(self, tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
        # A forward asks once at each site: one that asks again is in the next forward. That tells what versions do not,
        # as inference tensors have none, and writing through ``.data`` or numpy changes none. What is made in inference
        # mode cannot be saved for a backward.
        made = self._memory.setdefault(tensor, {})
        version = (None if tensor.is_inference() else tensor._version, torch.is_inference_mode_enabled())
        if name not in made or made[name][0] != version or self.site.name in made[name][1]:
            value = make(tensor)
            if _shares_memory(value, tensor):
                return value  # to keep it would keep the tensor, which would keep the entry, for ever
            made[name] = (version, set(), value)
        _, served, known = made[name]
        served.add(self.site.name)
        return known


def _shares_memory(value: Any, tensor: Tensor) -> bool:
    """Whether a tensor made from another, or one of a tuple of them, is that tensor or a view of it."""
    pointer = tensor.untyped_storage().data_ptr()
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, Tensor) and part.untyped_storage().data_ptr() == pointer for part in parts)


class PatchedForward:
    """What sits in a patched module's forward slot. Copies itself with the module; refuses to be pickled.

    Attributes:
        number: of the patch.
        group: names of all sites of the patch.
        removed: whether its patch was taken off again.
    """

    def __init__(
        self,
        number: int,
        group: list[str],
        found: Found,
        site: Site,
        backend: Backend | None,
        native: bool,
        fallback: bool,
        memory: WeakTensorKeyDictionary,
    ) -> None:
        self.number, self.group, self.found, self.site = number, group, found, site
        self.backend, self.native, self.fallback = backend, native, fallback
        self.original, self.removed = slots.current(found.module), False
        self._bind(memory)

    def _bind(self, memory: WeakTensorKeyDictionary) -> None:
        self._attend = SiteAttend(self, memory)
        self._forward: Callable[..., Any] | None = None
        if not self.native:
            self._forward = self.found.seam.bind(self.found.module, self._attend)
        functools.update_wrapper(self, self.original, updated=())
        # torch.compile stumbles over a forward with other globals, and over what looks at the data. So it leaves
        # patched modules alone and compiles what is around them; backends may compile inside. As a decorator this
        # would import the compiler with attnzoo; transformers has imported it when there is a model.
        self._uncompiled = torch.compiler.disable(PatchedForward._run, reason="attnzoo runs patched modules uncompiled")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._uncompiled(self, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward is None:
            self.site.kernels["native"] += 1
            return self.own(*args, **kwargs)
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            # What masks say is read from them: a trace would keep what the example's said, whatever comes later.
            raise PatchError(
                f'{self.site.name}: got a patched model to trace or export; allowed: one patched with "native", or '
                "attnzoo.unpatch(model) first"
            )
        states = args[0] if args else kwargs.get("hidden_states")
        if isinstance(states, Tensor) and 0 in states.shape:  # models fail on those in words of their own
            raise InvalidArgumentError(f"input of {self.site.name}", describe(states), "a tensor, none of its sizes 0")
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
            trains(self.found.module) or any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        )
        for request in expected_requests(self.found, grad, self._attend.sharers):
            dtype = compute_dtype(torch.empty(0, dtype=request.dtype, device=request.device))
            asked = replace(request, probabilities=probabilities, dtype=dtype)
            negotiate(self.backend, asked, self.site.name)

    def __deepcopy__(self, memo: dict[Any, Any]) -> PatchedForward:
        twin = object.__new__(PatchedForward)
        memo[id(self)] = twin
        vars(twin).update(vars(self))
        # Of a part of a model, the copy is a patch of just that part.
        twin.group = memo.setdefault((PatchedForward, self.number), [])
        twin.group.append(self.site.name)
        owner = memo.get(id(self.found.owner))
        twin.found = self.found._replace(module=copy.deepcopy(self.found.module, memo), owner=owner)
        twin.site = replace(self.site, kernels=Counter(self.site.kernels), choices=Counter(self.site.choices))
        twin.site.changed = Counter(self.site.changed)
        twin.original = copy.deepcopy(self.original, memo)
        twin._bind(memo.setdefault((SiteAttend, self.number), WeakTensorKeyDictionary()))
        return twin

    def __reduce__(self) -> Any:
        raise PatchError(
            f"{self.site.name}: a patched model cannot be pickled; allowed: model.save_pretrained, "
            "state_dict, or attnzoo.unpatch(model) first"
        )


def patches_of(module: nn.Module) -> Iterator[PatchedForward]:
    """The patches of one module, last in first."""
    for slot in ("_old_forward", "forward"):
        forward = vars(module).get(slot)
        while isinstance(forward, PatchedForward):
            yield forward
            forward = forward.original
