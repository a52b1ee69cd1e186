"""The forward of a patched module, and the object with which it computes attentions."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from attnzoo.errors import BackendRefusedError, InvalidArgumentError, KeywordRefusedError, PatchError
from attnzoo.functional import execute
from attnzoo.originals import slots
from attnzoo.patching.plan import SitePlan
from attnzoo.patching.sites import PatchTarget, Site
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention, Result, describe
from attnzoo.spec.transforms import transforms_around

T = TypeVar("T")


@dataclass(eq=False)
class Patch:
    """The shared part of the forwards of one patch. Holds modules weakly, because a patched module holds its forward.

    Attributes:
        number: grows with each patch of the process.
        root: the patched model, weakly.
        names: names of the modules in the model that the patch covers.
        guarded: the models in it that refuse continuous batching while the patch is in place (``engines``), weakly.
        memory: the values that :meth:`SiteAttend.cached_per_forward` remembers.
    """

    number: int
    root: weakref.ref[nn.Module]
    names: list[str] = field(default_factory=list)
    guarded: list[weakref.ref[nn.Module]] = field(default_factory=list)
    memory: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)


class SiteAttend:
    """The :class:`~attnzoo.adapter.Attend` of one site: runs attentions on its backend and records what ran.

    Attributes:
        sharers: modules that share values with the site (``PatchPoint.shared_in``), itself included; empty if none do.
    """

    def __init__(self, site: Site, plan: SitePlan, fallback: bool, memory: WeakTensorKeyDictionary) -> None:
        self.site, self.plan, self._fallback, self._memory = site, plan, fallback, memory

    @functools.cached_property
    def _weak_sharers(self) -> tuple[weakref.ref[nn.Module], ...]:
        # Computed at the first call, because the owner of a deep copy is incomplete while it is being copied.
        target = self.plan.target
        return () if target.owner is None else tuple(map(weakref.ref, target.point.sharers(target.owner)))

    @property
    def sharers(self) -> tuple[nn.Module, ...]:
        return tuple(module for sharer in self._weak_sharers if (module := sharer()) is not None)

    @property
    def complete(self) -> bool:
        top = [next(patches_of(module), None) for module in self.sharers]
        whole = bool(top) and len(top) == len(self._weak_sharers)
        return whole and not any(patched is None or patched.may_run_native for patched in top)

    def __call__(self, attention: Attention, probabilities: bool = False) -> Result:
        site = self.site
        try:
            choice = self.plan.backend.select(attention, probabilities)
        except BackendRefusedError as error:
            raise error.at(site.label, "in the call") from None
        backend = choice.backend
        result = execute(backend, attention, probabilities, site.label)
        site.kernels[result.kernel] += 1
        change = None if backend.capabilities.exact else backend.changes(attention.request(probabilities))
        if change is not None:
            site.changed[change] += 1
        if choice.reason:
            site.selections[choice] += 1
        if site.observer is not None:
            site.observer(site, attention, result, backend)
        return result

    def takes(self, attention: Attention) -> bool:
        return not registry.refusals(self.plan.backend, attention.request())

    def falls_back(self, can: bool = True) -> bool:
        self.site.fallbacks += self._fallback and can
        return self._fallback and can

    def cached_per_forward(self, tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
        # Each forward asks once per site, so a site that asks again is in the next forward. Version counters cannot
        # tell that: inference tensors have none, and writes through ``.data`` or numpy do not change them. A value
        # made in inference mode cannot be saved for a backward, so the mode is part of the version.
        if transforms_around(()):  # tensors made under torch.func have no storage and are useless outside
            return make(tensor)
        entries = self._memory.setdefault(tensor, {})
        version = (None if tensor.is_inference() else tensor._version, torch.is_inference_mode_enabled())
        if name not in entries or entries[name][0] != version or self.site.name in entries[name][1]:
            value = make(tensor)
            if _shares_memory(value, tensor):
                return value  # an entry that holds its own key would never be freed
            entries[name] = (version, set(), value)
        _, served, known = entries[name]
        served.add(self.site.name)
        return known


def _shares_memory(value: Any, tensor: Tensor) -> bool:
    """Whether a value, or a member of a tuple, is the tensor or a view of it."""
    pointer = tensor.untyped_storage().data_ptr()
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, Tensor) and part.untyped_storage().data_ptr() == pointer for part in parts)


class _CalledModule(threading.local):
    """The module that a pre-hook saw being called on this thread, weakly; None once its forward runs."""

    module: weakref.ref[nn.Module] | None = None

    def __reduce__(self) -> Any:
        # accelerate copies the attributes of a forward to its wrapper, and deep copies copy wrappers.
        return _CalledModule, ()


class PatchedForward(slots.Replacement):
    """The callable in a patched module's forward slot. Copies itself with the module; refuses to be pickled.

    Copies of the module that share its attributes (``copy.copy``, replicas of ``nn.DataParallel``) share this object,
    and an instance attribute gets no ``self``. So a forward pre-hook notes the module being called, per thread, and
    each call computes with the weights of that module.

    Attributes:
        native: whether every call runs the model's own code.
        fallback: whether calls that the backend refuses run the model's own code.
        removed: whether the patch was removed.
        original: the forward beneath this one; None: that of the module's class.
    """

    def __init__(self, patch: Patch, plan: SitePlan, fallback: bool) -> None:
        target, module = plan.target, plan.target.module
        self.patch, self.plan, self.fallback, self.removed = patch, plan, fallback, False
        self.point, self.native = target.point, plan.is_native
        pattern = target.point.describe(module)
        self.site = Site(target.name, target.cls.__name__, pattern, plan.backend.name, plan.changes)
        self.original = slots.current(module)
        self._bind()
        self._pre_hook: RemovableHandle | None = None
        functools.update_wrapper(self, self.original or target.cls.forward, updated=())
        self.__signature__ = inspect.signature(module.forward)
        # torch.compile cannot trace a forward with other globals, or one that reads tensor values. So it leaves patched
        # modules alone and compiles the rest; backends may compile inside. As a decorator this would import the
        # compiler together with attnzoo; transformers has imported it once there is a model.
        # A module that attends nothing contains most of the model: only this frame of it stays uncompiled.
        self._uncompiled = torch.compiler.disable(
            PatchedForward._run, reason="attnzoo runs patched modules uncompiled", recursive=self.point.attends
        )
        # The noted module changes with each call: compiled code would be guarded on it.
        self._note = torch.compiler.disable(PatchedForward._note_module)
        self._find_module = torch.compiler.disable(PatchedForward._module_of_call)
        self._traced: nn.Module | None = None  # the module noted inside a graph, until its forward runs

    def _bind(self) -> None:
        self._called = _CalledModule()
        self._attend = SiteAttend(self.site, self.plan, self.fallback, self.patch.memory)
        self._forward = None if self.native else self.point.bind(self.plan.target.cls, self._attend)

    @property
    def may_run_native(self) -> bool:
        """Whether a call can run the model's own code."""
        return self.native or self.fallback

    @property
    def module(self) -> nn.Module | None:
        """The module that was patched; None if it was freed."""
        return self.plan.target.alive

    def of(self, module: nn.Module) -> PatchTarget:
        """The patch target for a module: the patched module or a copy of it."""
        return self.plan.target.at(module, self.plan.target.owner)

    def put(self) -> None:
        """Take the module's forward over."""
        module = self.plan.target.module
        slots.put(module, self)
        self._pre_hook = module.register_forward_pre_hook(self._note_call)

    def take_off(self, module: nn.Module) -> None:
        """Restore the forward of a module: the patched module or a copy of it."""
        slots.take_back(module, self, self.original)
        if module is self.module:
            self.removed = True
            if self._pre_hook is not None:
                self._pre_hook.remove()

    def _note_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.native and torch.compiler.is_compiling():
            self._traced = module  # the compiler can trace an attribute, but no thread-local value
        else:
            self._note(self, module)

    def _note_module(self, module: nn.Module) -> None:
        self._called.module = weakref.ref(module)

    def _module_of_call(self) -> nn.Module:
        """The module being called: the noted module, or the patched module if none is noted."""
        noted, self._called.module = self._called.module, None
        module = None if noted is None else noted()
        if module is not None and self in patches_of(module):
            return module
        patched = self.module
        if patched is None or self.removed:
            raise PatchError(
                f"{self.site.label}: got a call through a copy of a module whose patch is gone; allowed: "
                "attnzoo.unpatch(copy) before the original's patch is removed, or copy.deepcopy"
            )
        return patched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.native and torch.compiler.is_compiling():
            # The compiler traces the model's own code. Calls inside a graph cannot be counted.
            module, self._traced = self._traced or self.module, None
            return self._run_original(module, args, kwargs)
        if self._forward is not None and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            # Patched modules read the values of masks: a trace would keep those of its example for all later inputs.
            raise PatchError(
                f"{self.site.label}: got a patched model to trace or export; allowed: a model patched with "
                '"native", or attnzoo.unpatch(model) first'
            )
        return self._uncompiled(self, args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], nn.Module):  # called as a method
            module, args = args[0], args[1:]
        else:
            module = self._find_module(self)
        if self._forward is None:
            self.site.kernels["native"] += 1
            return self._run_original(module, args, kwargs)
        states = args[0] if args else kwargs.get("hidden_states")
        if isinstance(states, Tensor) and 0 in states.shape:  # models fail on empty inputs with unclear errors
            raise InvalidArgumentError(f"input of {self.site.label}", describe(states), "a tensor, none of its sizes 0")
        try:
            self.plan.check_call(module, args, kwargs, self._attend.sharers)
        except (BackendRefusedError, KeywordRefusedError):
            if not self._attend.falls_back(self.point.fault(module) is None):
                raise
            return self._run_original(module, args, kwargs)
        return self._forward(module, *args, **kwargs)

    def _run_original(self, module: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the model's own forward of a module, beneath every patch."""
        forward = self.original
        while isinstance(forward, PatchedForward):
            forward = forward.original
        return self.plan.target.cls.forward(module, *args, **kwargs) if forward is None else forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[Any, Any]) -> PatchedForward:
        twin = object.__new__(PatchedForward)
        memo[id(self)] = twin
        vars(twin).update(vars(self))
        root, target = self.patch.root(), self.plan.target
        whole = root is not None and id(root) in memo
        # The copy of a whole model has a patch with separate counts. The copy of a part may be put into the model, as
        # PEFT does: its calls count at the original's site, and it belongs to the original's patch.
        key = (Patch, self.patch.number)
        if key not in memo:
            memo[key] = Patch(self.patch.number, weakref.ref(memo[id(root)]) if whole else self.patch.root)
        twin.patch = memo[key]
        twin.patch.names.append(self.site.name)
        if whole:
            twin.site = self.site.copy()
        twin.original = copy.deepcopy(self.original, memo)
        twin.plan = replace(self.plan, target=target.at(memo.get(id(target.alive)), memo.get(id(target.owner))))
        twin._bind()
        twin._pre_hook = copy.deepcopy(self._pre_hook, memo)
        return twin

    def __reduce__(self) -> Any:
        raise PatchError(
            f"{self.site.label}: a patched model cannot be pickled; allowed: model.save_pretrained, "
            "state_dict, or attnzoo.unpatch(model) first"
        )


def patches_of(module: nn.Module) -> Iterator[PatchedForward]:
    """The patches of one module, the last one first."""
    for slot in slots.SLOTS:
        forward = slots.unbound(vars(module).get(slot))
        while isinstance(forward, PatchedForward):
            yield forward
            forward = forward.original
