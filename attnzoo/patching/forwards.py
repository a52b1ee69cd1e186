"""The forward of a patched module, and the object that computes the attentions of the module."""

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

from attnzoo.auto.selection import AutoBackend
from attnzoo.backend import Backend, Choice
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, KeywordRefusedError, PatchError
from attnzoo.functional import execute
from attnzoo.graphs.operator import NO_SITE, attend_in_graph, register_runner
from attnzoo.originals import slots
from attnzoo.patching.plan import SitePlan
from attnzoo.patching.sites import PatchTarget, Site
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention, Result, describe
from attnzoo.spec.transforms import transforms_around

T = TypeVar("T")


@dataclass(eq=False)
class Patch:
    """Data that all forwards of one patch share. References to modules are weak, because modules refer to forwards.

    Attributes:
        number: the serial number of the patch. Later patches in the process have larger numbers.
        root: weak reference to the patched model.
        names: names of the patched modules in the model.
        guarded: weak references to the models inside ``root`` that support continuous batching (see ``engines``).
        memory: the cached results of :meth:`SiteAttend.cached_per_forward`, by input tensor.
    """

    number: int
    root: weakref.ref[nn.Module]
    names: list[str] = field(default_factory=list)
    guarded: list[weakref.ref[nn.Module]] = field(default_factory=list)
    memory: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)


class SiteAttend:
    """The :class:`~attnzoo.adapter.Attend` of one site. It runs attentions on the site's backend and counts them."""

    def __init__(self, site: Site, plan: SitePlan, fallback: bool, memory: WeakTensorKeyDictionary) -> None:
        self.site, self.plan, self._fallback, self._memory = site, plan, fallback, memory
        self._selects = type(plan.backend).select is not Backend.select
        self._number = register_runner(self)
        torch.compiler.assume_constant_result(SiteAttend._is_complete)

    @functools.cached_property
    def _weak_sharers(self) -> tuple[weakref.ref[nn.Module], ...]:
        # Computed at the first call, because the owner of a deep copy is incomplete until the copy is finished.
        target = self.plan.target
        return () if target.owner is None else tuple(map(weakref.ref, target.point.sharers(target.owner)))

    def sharers(self) -> tuple[nn.Module, ...]:
        """Return the site's module, and all modules that share a computed value with this module, such as a bias.

        The result is empty if the patch point has no ``shared_in``.
        """
        return tuple(module for sharer in self._weak_sharers if (module := sharer()) is not None)

    @property
    def complete(self) -> bool:
        return self._is_complete()

    def _is_complete(self) -> bool:
        # A compiler calls this method once. A later patch changes a forward, and starts a new compilation.
        top = [next(patches_of(module), None) for module in self.sharers()]
        whole = bool(top) and len(top) == len(self._weak_sharers)
        return whole and not any(patched is None or patched.may_run_native for patched in top)

    def __call__(self, attention: Attention, probabilities: bool = False) -> Result:
        if torch.compiler.is_compiling():
            number = NO_SITE if torch.compiler.is_exporting() else self._number
            return Result(attend_in_graph(attention, number, self.plan.backend.name), "unknown in a graph")
        site, (backend, choice) = self.site, self._select(attention, probabilities)
        result = execute(backend, attention, probabilities, site.label)
        site.kernels[result.kernel] += 1
        if not backend.capabilities.exact and (change := backend.changes(attention.request(probabilities))) is not None:
            site.changed[change] += 1
        if choice is not None and choice.reason:
            site.selections[choice] += 1
        if site.observer is not None:
            site.observer(site, attention, result, backend)
        return result

    def _select(self, attention: Attention, probabilities: bool) -> tuple[Backend, Choice | None]:
        """Return the backend that runs an attention and, if this backend was selected, the choice."""
        if not self._selects:
            return self.plan.backend, None
        try:
            choice = self.plan.backend.select(attention, probabilities)
        except BackendRefusedError as error:
            raise error.at(self.site.label, "in the call") from None
        return choice.backend, choice

    def repeat(self, attention: Attention) -> Tensor:
        """Return the output of an attention, without counting it."""
        return execute(self._select(attention, False)[0], attention, place=self.site.label).output

    def takes(self, attention: Attention) -> bool:
        return not registry.refusals(self.plan.backend, attention.request())

    def falls_back(self, can: bool = True) -> bool:
        self.site.fallbacks += self._fallback and can
        return self._fallback and can

    def cached_per_forward(self, tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
        # Each site calls this method once per forward, so a second call of a site starts the next forward. The version
        # counter of a tensor is not enough: inference tensors have no counter, and writes through ``.data`` or numpy do
        # not change the counter. Autograd records nothing under no_grad, and cannot save tensors from inference mode.
        # So ``version`` includes both modes.
        if torch.compiler.is_compiling():  # compilers remove equal computations
            return make(tensor)
        if transforms_around(()):  # torch.func's tensors have no storage and cannot be used after the transform
            return make(tensor)
        entries = self._memory.setdefault(tensor, {})
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        version = (None if tensor.is_inference() else tensor._version, *modes)
        if name not in entries or entries[name][0] != version or self.site.name in entries[name][1]:
            value = make(tensor)
            if _shares_memory(value, tensor):
                return value  # an entry that refers to its own key would never be freed
            entries[name] = (version, set(), value)
        _, served, known = entries[name]
        served.add(self.site.name)
        return known


# What compiles the functions that this thread calls, or None. PyTorch has no public function for this. Only if nothing
# does may a forward run without the wrapper of ``torch.compiler.disable``, which takes as long as counting a call.
# ``is_compiling`` is not enough: it is False below a frame that the compiler has given up, where the compiler compiles
# the functions that this frame calls. Without the private function, every forward runs in the wrapper.
_eval_frame = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_compiler_callback = getattr(_eval_frame, "get_eval_frame_callback", object)


def _shares_memory(value: Any, tensor: Tensor) -> bool:
    """Whether ``value``, or a member of the tuple ``value``, is a tensor that shares memory with ``tensor``."""
    pointer = tensor.untyped_storage().data_ptr()
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, Tensor) and part.untyped_storage().data_ptr() == pointer for part in parts)


class _CalledModule(threading.local):
    """Weak reference to the module whose forward starts next on this thread. The forward resets it to None."""

    module: weakref.ref[nn.Module] | None = None

    def __reduce__(self) -> Any:
        # Needed for deep copies of a model with accelerate's wrapper, which has the attributes of the wrapped forward.
        return _CalledModule, ()


class PatchedForward(slots.Replacement):
    """The callable that replaces the forward of a patched module. It supports ``copy.deepcopy`` and refuses pickling.

    Shallow copies of the module (``copy.copy``, replicas of ``nn.DataParallel``) share this object. Python passes no
    ``self`` to a function that is stored in an instance attribute. Therefore a forward pre-hook records for each thread
    which module is called, and each call computes with the weights of the recorded module.

    Attributes:
        native: whether every call runs the model's original code.
        fallback: whether calls that the backend refuses run the model's original code.
        removed: whether the patch was removed.
    """

    def __init__(self, patch: Patch, plan: SitePlan, fallback: bool, replaces: bool = False) -> None:
        """Prepare the forward. With ``replaces``, the caller must remove all earlier patches before :meth:`put`."""
        target, module = plan.target, plan.target.module
        self.patch, self.plan, self.fallback, self.removed = patch, plan, fallback, False
        self.point, self.native = target.point, plan.is_native
        pattern = target.point.describe(module)
        self.site = Site(target.name, target.cls.__name__, pattern, plan.backend.name, plan.changes)
        self.original = slots.current(module)
        while replaces and isinstance(self.original, PatchedForward):
            self.original = self.original.original
        self._bind()
        self._pre_hook: RemovableHandle | None = None
        functools.update_wrapper(self, self.original or target.cls.forward, updated=())
        self.__signature__ = inspect.signature(module.forward)
        # torch.compile cannot trace a forward that reads tensor values. Such a module, and a call that the backend
        # refuses, runs uncompiled between two graphs. Backends may call the compiler.
        # A decorator would import the compiler together with attnzoo. Here, transformers has already done so.
        # A module without attention may contain most of the model, so only the module's own frame is uncompiled.
        self._uncompiled = torch.compiler.disable(
            PatchedForward._run, reason="attnzoo runs patched modules uncompiled", recursive=self.point.attends
        )
        # The recorded module changes with each call, so compiled code would be recompiled for each module.
        self._note = torch.compiler.disable(PatchedForward._note_module)
        self._find_module = torch.compiler.disable(PatchedForward._module_of_call)
        selects = isinstance(plan.backend, AutoBackend)
        # An approximate backend changes patterns, and a graph contains masks that no pattern describes.
        self.traceable = self.native or (self.point.traceable and plan.backend.capabilities.exact and not selects)
        torch.compiler.assume_constant_result(PatchedForward._is_supported)
        self._traced: nn.Module | None = None  # the module that the compiler recorded, until the module's forward runs

    def _bind(self) -> None:
        self._called = _CalledModule()
        self._attend = SiteAttend(self.site, self.plan, self.fallback, self.patch.memory)
        self._forward = None if self.native else self.point.bind(self.plan.target.cls, self._attend)
        backend = self.plan.backend
        self._chooser = backend.chooser(self.point) if isinstance(backend, AutoBackend) else None

    @property
    def may_run_native(self) -> bool:
        """Whether any call can run the model's original code, whatever values other patched modules have passed to it.

        ``auto`` checks with :meth:`PatchPoint.original_serves` whether the original code can read the arguments.
        """
        return self.native or self.fallback

    @property
    def module(self) -> nn.Module | None:
        """The module that was patched, or None if the module was freed."""
        return self.plan.target.alive

    def of(self, module: nn.Module) -> PatchTarget:
        """Return the patch target for ``module``, which must be the patched module or a copy of this module."""
        return self.plan.target.at(module, self.plan.target.owner)

    def put(self) -> None:
        """Replace the forward of the module with this object."""
        module = self.plan.target.module
        slots.put(module, self)
        self._pre_hook = module.register_forward_pre_hook(self._note_call)

    def take_off(self, module: nn.Module) -> None:
        """Restore the forward of ``module``, which must be the patched module or a copy of this module."""
        slots.take_back(module, self, self.original)
        if module is self.module:
            self.removed = True
            if self._pre_hook is not None:
                self._pre_hook.remove()

    def _note_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._called.module = weakref.ref(module)
        elif self.traceable:
            self._traced = module  # the compiler can trace attributes, but not thread-local values
        else:
            self._note(self, module)

    def _note_module(self, module: nn.Module) -> None:
        self._called.module = weakref.ref(module)

    def _module_of_call(self) -> nn.Module:
        """Return the module of this call: the recorded module, or the patched module if no module is recorded."""
        noted, self._called.module = self._called.module, None
        module, patched = None if noted is None else noted(), self.plan.target.alive
        if module is not None and ((module is patched and not self.removed) or self in patches_of(module)):
            return module
        if patched is None or self.removed:
            raise PatchError(
                f"{self.site.label}: got a call of a shallow copy (copy.copy) whose original is no longer patched; "
                "allowed: attnzoo.unpatch(the copy) before the call, or copy.deepcopy, whose copies keep their patch"
            )
        return patched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compile(args, kwargs)
        if self._forward is not None and torch.jit.is_tracing():
            raise self._refuse_recording()
        if _compiler_callback() is not None:
            return self._uncompiled(self, args, kwargs)
        return self._run(args, kwargs)

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the compiler trace the forward, or run it between two graphs."""
        if not self.traceable:
            if torch.compiler.is_exporting():
                raise self._refuse_recording()
            return self._uncompiled(self, args, kwargs)
        module, self._traced = self._traced or self.module, None
        if args and isinstance(args[0], nn.Module):  # called as a method
            module, args = args[0], args[1:]
        if module is None:
            return self._uncompiled(self, args, kwargs)  # raises
        if self._forward is None:
            return self._run_original(module, args, kwargs)  # calls inside the graph cannot be counted
        given = tuple(name for name, value in kwargs.items() if value is not None)
        wanted, grad = kwargs.get("output_attentions"), torch.is_grad_enabled()
        # The compiler records what is read here as a condition of the graph. It does not see the reads of the method.
        conditions = getattr(getattr(module, "config", None), "output_attentions", None), module.training
        if self._is_supported(given, wanted, grad, conditions, torch.compiler.is_exporting()):
            return self._forward(module, *args, **kwargs)
        if torch.compiler.is_exporting():
            raise self._refuse_recording()
        return self._uncompiled(self, (module, *args), kwargs)

    def _is_supported(
        self,
        given: tuple[str, ...],
        wanted: bool | None,
        grad: bool,
        conditions: tuple[bool | None, bool],
        exporting: bool,
    ) -> bool:
        """Whether a graph may contain a call (:meth:`SitePlan.fits_graph`). The compiler asks once per graph.

        If not, the forward runs uncompiled: it then refuses the call, or falls back, before it touches a cache. The
        answer depends on the ``conditions`` through the module: ``config.output_attentions``, and its mode.
        """
        return self.plan.fits_graph(given, wanted, grad, exporting, self._attend.sharers)

    def _refuse_recording(self) -> PatchError:
        """Return the error for a trace or an export that cannot contain the forward."""
        return PatchError(
            f"{self.site.label}: got a patched model to trace or export; allowed: torch.export of modules that backend "
            f"{self.plan.backend.name!r} supports without options, a model patched with "
            'backend="native", or a model without a patch (call attnzoo.unpatch(model))'
        )

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], nn.Module):  # called as a method
            module, args = args[0], args[1:]
        else:
            module = self._module_of_call() if _compiler_callback() is None else self._find_module(self)
        if self._forward is None:
            self.site.kernels["native"] += 1
            return self._run_original(module, args, kwargs)
        states = self.point.states_of(args, kwargs)
        if isinstance(states, Tensor) and 0 in states.shape:  # models fail on empty inputs with unclear errors
            allowed = "a tensor with all sizes at least 1"
            raise InvalidArgumentError(f"input of {self.site.label}", describe(states), allowed)
        if self.point.attends:
            try:
                self.plan.check_call(module, args, kwargs, self._attend.sharers)
            except (BackendRefusedError, KeywordRefusedError):
                if not self._attend.falls_back(self.point.fault(module) is None):
                    raise
                return self._run_original(module, args, kwargs)
        choice = None if self._chooser is None else self._chooser.choose(module, args, kwargs)
        if choice is not None:
            self.site.kernels["native"] += 1
            self.site.selections[choice] += 1
            return self._run_original(module, args, kwargs)
        return self._forward(module, *args, **kwargs)

    def _run_original(self, module: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the original forward of a module, without any patch."""
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
        # The copy of a whole model has a patch with separate counts. The copy of a module may be put into the model, as
        # PEFT does. Calls of such a copy count at the site of the original module, in the same patch.
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
            f"{self.site.label}: got a patched model, which cannot be pickled; allowed: model.save_pretrained, "
            "model.state_dict, or a model without a patch (call attnzoo.unpatch(model))"
        )


def patches_of(module: nn.Module) -> Iterator[PatchedForward]:
    """Yield the patched forwards of one module, from the last patch to the first."""
    for slot in slots.SLOTS:
        forward = slots.unbound(vars(module).get(slot))
        while isinstance(forward, PatchedForward):
            yield forward
            forward = forward.original
