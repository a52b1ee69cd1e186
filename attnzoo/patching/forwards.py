"""The forward that sits in a patched module, and what it computes attentions with."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from attnzoo.auto import selection
from attnzoo.backend import Backend
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, KeywordRefusedError, PatchError
from attnzoo.functional import compute_dtype, execute, negotiate
from attnzoo.originals import slots
from attnzoo.patching.keywords import check_keywords
from attnzoo.patching.sites import PatchTarget, Site, expected_requests, trains
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention, Result, describe
from attnzoo.spec.transforms import transforms_around

T = TypeVar("T")


@dataclass(eq=False)
class Patch:
    """What the forwards of one patch share. It holds no module, as forwards hold it and modules hold forwards.

    Attributes:
        number: patches of later calls have higher numbers.
        root: the model that was patched, weakly.
        names: names of the modules in the model that the patch has taken over.
        guarded: the models in it that refuse continuous batching while it is in place (``engines``), weakly.
        memory: what :meth:`SiteAttend.cached_per_forward` remembers.
    """

    number: int
    root: weakref.ref[nn.Module]
    names: list[str] = field(default_factory=list)
    guarded: list[weakref.ref[nn.Module]] = field(default_factory=list)
    memory: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)


class SiteAttend:
    """What a point's forward computes with: a backend, a site to record on, and the patch's per-forward memory.

    Attributes:
        sharers: modules that share values with the site (``PatchPoint.shared_in``), itself included; empty if none do.
    """

    def __init__(self, patched: PatchedForward, owner: nn.Module | None) -> None:
        self.site, self.backend, self._fallback = patched.site, patched.backend, patched.fallback
        self._seam, self._memory = patched.point, patched.patch.memory
        self._owner = None if owner is None else weakref.ref(owner)

    @functools.cached_property
    def _weak_sharers(self) -> tuple[weakref.ref[nn.Module], ...]:
        # Looked up at the first call, since the owner of a deep copy is not whole while it is being copied.
        owner = None if self._owner is None else self._owner()
        return () if owner is None else tuple(map(weakref.ref, self._seam.sharers(owner)))

    @property
    def sharers(self) -> tuple[nn.Module, ...]:
        return tuple(module for sharer in self._weak_sharers if (module := sharer()) is not None)

    @property
    def complete(self) -> bool:
        last = [next(patches_of(module), None) for module in self.sharers]
        whole = bool(last) and len(last) == len(self._weak_sharers)
        return whole and not any(patched is None or patched.native or patched.fallback for patched in last)

    def __call__(self, attention: Attention, probabilities: bool = False) -> Result:
        backend, choice = self.backend, None
        if backend is None:
            choice = selection.choose_for(attention, probabilities)
            backend = choice.backend
        result = execute(backend, attention, probabilities, self.site.label)
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
        return (
            bool(registry.supporting_backends(request))
            if self.backend is None
            else not registry.refusals(self.backend, request)
        )

    def falls_back(self, can: bool = True) -> bool:
        self.site.fallbacks += self._fallback and can
        return self._fallback and can

    def cached_per_forward(self, tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
        # A forward asks once at each site, so a site that asks again is in the next forward. Version counters are not
        # enough: inference tensors have none, and writes through ``.data`` or numpy do not change them. What is made in
        # inference mode cannot be saved for a backward.
        if transforms_around(()):  # what is made under torch.func has no storage, and is of no use outside
            return make(tensor)
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


class _Noted(threading.local):
    """The module that a pre-hook saw being called on this thread, weakly; None once its forward runs."""

    module: weakref.ref[nn.Module] | None = None

    def __reduce__(self) -> Any:
        # accelerate copies the attributes of a forward to its wrapper, and wrappers are copied with their models.
        return _Noted, ()


class PatchedForward(slots.Replacement):
    """What sits in a patched module's forward slot. Copies itself with the module; refuses to be pickled.

    Copies of the module that share its attributes (``copy.copy``, replicas of ``nn.DataParallel``) share this object,
    and an instance attribute is not told which module it is called on. So a forward pre-hook tells it, on the same
    thread, and every call computes with the weights of the module that was called.

    Attributes:
        patch: what all forwards of the patch share.
        removed: whether its patch was taken off again.
        original: the forward beneath it; None: that of the module's class.
    """

    def __init__(
        self, patch: Patch, found: PatchTarget, site: Site, backend: Backend | None, native: bool, fallback: bool
    ) -> None:
        self.patch, self.site, self.removed = patch, site, False
        self.point, self._adapter, self._cls = found.point, found.adapter, type(found.module)
        self.backend, self.native, self.fallback = backend, native, fallback
        self.original = slots.current(found.module)
        self._bind(found.module, found.owner)
        self._pre_hook: RemovableHandle | None = None
        functools.update_wrapper(self, self.original or self._cls.forward, updated=())
        self.__signature__ = inspect.signature(found.module.forward)
        # torch.compile stumbles over a forward with other globals, and over what looks at the data. So it leaves
        # patched modules alone and compiles what is around them; backends may compile inside. As a decorator this
        # would import the compiler with attnzoo; transformers has imported it when there is a model.
        # A module that attends nothing holds most of the model: of that, only this frame stays uncompiled.
        self._uncompiled = torch.compiler.disable(
            PatchedForward._run,
            reason="attnzoo runs patched modules uncompiled",
            recursive=self.point.attends,
        )
        # Notes belong to a thread: the compiler would guard on them, and they change with each call.
        self._note = torch.compiler.disable(PatchedForward._note_module)
        self._find_module = torch.compiler.disable(PatchedForward._module_of_call)
        self._traced: nn.Module | None = None  # what is noted inside a graph, until the forward runs

    def _bind(self, module: nn.Module | None, owner: nn.Module | None) -> None:
        self._module = None if module is None else weakref.ref(module)
        self._owner = None if owner is None else weakref.ref(owner)
        self._noted = _Noted()
        self._attend = SiteAttend(self, owner)
        self._forward = None if self.native else self.point.bind(self._cls, self._attend)

    @property
    def module(self) -> nn.Module | None:
        """The module that was patched; None if it is gone."""
        return None if self._module is None else self._module()

    @property
    def owner(self) -> nn.Module | None:
        """The module in which it shares values with others (``PatchPoint.shared_in``), if there is one."""
        return None if self._owner is None else self._owner()

    def of(self, module: nn.Module) -> PatchTarget:
        """The patch target for a module: the patched module or a copy of it."""
        return PatchTarget(self.site.name, module, self.point, self._adapter, self.owner)

    def put(self) -> None:
        """Take the module's forward over."""
        if self.module is not None:
            slots.put(self.module, self)
            self._pre_hook = self.module.register_forward_pre_hook(self._note_call)

    def take_off(self, module: nn.Module) -> None:
        """Give a module's forward back: that of the module that was patched, or of a copy of it."""
        slots.take_back(module, self, self.original)
        if module is self.module:
            self.removed = True
            if self._pre_hook is not None:
                self._pre_hook.remove()

    def _note_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.native and torch.compiler.is_compiling():
            self._traced = module  # the compiler follows an attribute through its graph, and not a thread's own
        else:
            self._note(self, module)

    def _note_module(self, module: nn.Module) -> None:
        self._noted.module = weakref.ref(module)

    def _module_of_call(self) -> nn.Module:
        """The module being called: what the pre-hook noted; without a note, the patched module."""
        noted, self._noted.module = self._noted.module, None
        module = None if noted is None else noted()
        if module is not None and self in patches_of(module):
            return module
        if self.module is None or self.removed:
            raise PatchError(
                f"{self.site.label}: got a call through a copy of a module whose patch is gone; allowed: "
                "attnzoo.unpatch(copy) before the original's patch is removed, or copy.deepcopy"
            )
        return self.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.native and torch.compiler.is_compiling():
            # What is compiled here is the model's own code. Its calls are not counted: a graph counts nothing.
            module, self._traced = self._traced or self.module, None
            return self._run_own(module, args, kwargs)
        if self._forward is not None and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            # What masks say is read from them: a trace would keep what the example's said, whatever comes later.
            raise PatchError(
                f'{self.site.label}: got a patched model to trace or export; allowed: one patched with "native", or '
                "attnzoo.unpatch(model) first"
            )
        return self._uncompiled(self, args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], nn.Module):  # called as a method
            module, args = args[0], args[1:]
        else:
            module = self._find_module(self)
        if self._forward is None:
            self.site.kernels["native"] += 1
            return self._run_own(module, args, kwargs)
        states = args[0] if args else kwargs.get("hidden_states")
        if isinstance(states, Tensor) and 0 in states.shape:  # models fail on those in words of their own
            raise InvalidArgumentError(f"input of {self.site.label}", describe(states), "a tensor, none of its sizes 0")
        try:
            if self.point.attends:
                check_keywords(module, kwargs)
            self._negotiate(module, (*args, *kwargs.values()), kwargs)
        except (BackendRefusedError, KeywordRefusedError):
            if not self._attend.falls_back(self.point.fault(module) is None):
                raise
            return self._run_own(module, args, kwargs)
        return self._forward(module, *args, **kwargs)

    def _run_own(self, module: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the model's own forward of a module, beneath every patch."""
        forward = self.original
        while isinstance(forward, PatchedForward):
            forward = forward.original
        return self._cls.forward(module, *args, **kwargs) if forward is None else forward(*args, **kwargs)

    def _negotiate(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse before anything happens what can be known before anything happens."""
        if self.backend is None:
            return
        probabilities, transforms = self.point.wants_probabilities(module, kwargs), transforms_around(inputs)
        grad = torch.is_grad_enabled() and (
            trains(module) or any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        )
        sharers = self._attend.sharers or (module,)
        for request in expected_requests(self.of(module), grad, sharers):
            dtype = compute_dtype(torch.empty(0, dtype=request.dtype, device=request.device))
            asked = replace(request, probabilities=probabilities, dtype=dtype, transforms=transforms)
            negotiate(self.backend, asked, self.site.label)

    def __deepcopy__(self, memo: dict[Any, Any]) -> PatchedForward:
        twin = object.__new__(PatchedForward)
        memo[id(self)] = twin
        vars(twin).update(vars(self))
        root = self.patch.root()
        whole = root is not None and id(root) in memo
        # The copy of a whole model is a patch with its own counts. The copy of a part may be put into the model, as
        # PEFT does: its calls count at the site of the original, and it belongs to the same patch.
        key = (Patch, self.patch.number)
        if key not in memo:
            memo[key] = Patch(self.patch.number, weakref.ref(memo[id(root)]) if whole else self.patch.root)
        twin.patch = memo[key]
        twin.patch.names.append(self.site.name)
        if whole:
            twin.site = replace(self.site, kernels=Counter(self.site.kernels), choices=Counter(self.site.choices))
            twin.site.changed = Counter(self.site.changed)
        twin.original = copy.deepcopy(self.original, memo)
        twin._bind(memo.get(id(self.module)), memo.get(id(self.owner)))
        twin._pre_hook = copy.deepcopy(self._pre_hook, memo)
        return twin

    def __reduce__(self) -> Any:
        raise PatchError(
            f"{self.site.label}: a patched model cannot be pickled; allowed: model.save_pretrained, "
            "state_dict, or attnzoo.unpatch(model) first"
        )


def patches_of(module: nn.Module) -> Iterator[PatchedForward]:
    """The patches of one module, last in first."""
    for slot in slots.SLOTS:
        forward = slots.unbound(vars(module).get(slot))
        while isinstance(forward, PatchedForward):
            yield forward
            forward = forward.original
