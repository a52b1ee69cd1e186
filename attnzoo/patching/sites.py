"""Find the attention modules of a model that adapters can patch. Describe their requests and count their kernels."""

from __future__ import annotations

import copy
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from attnzoo.adapter import Adapter, PatchPoint, parameters_of
from attnzoo.backend import Backend, Choice
from attnzoo.errors import InvalidArgumentError, PatchError, shorten
from attnzoo.functional import autocast_dtype
from attnzoo.originals.fingerprint import path_of
from attnzoo.patching import tally
from attnzoo.registry import ANY_MODEL_TYPE, registry
from attnzoo.spec.segments import Attention, Request, Result

Observer = Callable[["Site", Attention, Result, Backend], None]


@dataclass(eq=False)
class Site:
    """One patched attention module.

    Attributes:
        name: the name of the module in the model.
        cls: the name of the module's class.
        pattern: the attention pattern in words, such as ``"causal"``.
        backend: name of the requested backend. ``"native"`` stands for the model's original code.
        changes: how the backend is expected to change the pattern, as text. Empty if the backend is exact.
        kernels: how often each kernel ran.
        calls: how many attentions the backend ran, plus how many forwards ran the model's code as ``native``.
        selections: how often ``auto`` made each choice, a backend or ``native``. Empty unless the requested backend is
            ``auto``.
        changed: how often the backend made each change of the pattern.
        fallbacks: how many forwards ran the model's original code because of ``fallback="native"``.
        observer: function called after each attention with the site, the attention, the result and the backend.
    """

    name: str
    cls: str
    pattern: str
    backend: str
    changes: tuple[str, ...] = ()
    kernels: Counter[str] = field(default_factory=Counter)
    selections: Counter[Choice] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    fallbacks: int = 0
    observer: Observer | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        tally.begin(self)

    # At the exit of the interpreter, global names are None. Default arguments are not.
    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting():
            tally.end(self)

    @property
    def label(self) -> str:
        """The module's name for messages. The whole model has no name, so its label is the class name."""
        return self.name or self.cls

    @property
    def calls(self) -> int:
        return sum(self.kernels.values())

    @property
    def kernel(self) -> str | None:
        """The kernels that ran so far, most frequent first, or None before the first call."""
        return "+".join(kernel for kernel, _ in self.kernels.most_common()) or None

    @property
    def approximate(self) -> str:
        """The pattern changes so far or, before the first call, the expected changes. Empty without changes."""
        return "; ".join(self.changed if self.calls else self.changes)

    @property
    def ran(self) -> str:
        """The requested backend and, for ``auto``, the backends selected so far, most frequent first."""
        selected = dict.fromkeys(choice.backend.name for choice, _ in self.selections.most_common())
        return f"{self.backend}: {'+'.join(selected)}" if selected else self.backend

    def copy(self) -> Site:
        """Return a copy that starts with the same counts and then counts separately."""
        return replace(
            self, kernels=self.kernels.copy(), selections=self.selections.copy(), changed=self.changed.copy()
        )


class PatchTarget:
    """A module that an adapter can patch. The reference to the module is weak, because the module refers to its target.

    Attributes:
        name: the name of the module in the model.
        alive: the module. None if the module was freed, or if :meth:`at` got no module.
        module: the module. Reading this attribute raises PatchError if the module was freed.
        owner: the module of class ``PatchPoint.shared_in`` that contains this module, or None.
        label: the module's name for messages, as in :attr:`Site.label`.
    """

    def __init__(
        self, name: str, module: nn.Module, point: PatchPoint, adapter: Adapter, owner: nn.Module | None
    ) -> None:
        self.name, self.cls, self.point, self.adapter = name, type(module), point, adapter
        self._module, self._owner = _weak(module), _weak(owner)

    def at(self, module: nn.Module | None, owner: nn.Module | None) -> PatchTarget:
        """Return a copy of this target that has the given module and owner."""
        twin = copy.copy(self)
        twin._module, twin._owner = _weak(module), _weak(owner)
        return twin

    @property
    def alive(self) -> nn.Module | None:
        return None if self._module is None else self._module()

    @property
    def module(self) -> nn.Module:
        module = self.alive
        if module is None:
            raise PatchError(f"{self.label}: got a module that was freed; allowed: keep a reference to the model")
        return module

    @property
    def owner(self) -> nn.Module | None:
        return None if self._owner is None else self._owner()

    @property
    def label(self) -> str:
        return self.name or self.cls.__name__

    def covered_modules(self) -> Iterable[nn.Module]:
        """Return the modules inside :attr:`owner` or, if there is no owner, inside :attr:`module`."""
        return (self.owner or self.module).modules()

    def expected_requests(self) -> tuple[Request, ...]:
        """Return the expected requests of the module for its current mode, device, dtype and autocast state."""
        sharers = (self.module,) if self.owner is None else self.point.sharers(self.owner)
        return expected_requests(self.point, self.module, sharers)


def _weak(module: nn.Module | None) -> weakref.ref[nn.Module] | None:
    return None if module is None else weakref.ref(module)


def expected_requests(
    point: PatchPoint,
    module: nn.Module,
    sharers: Iterable[nn.Module],
    grad: bool | None = None,
    probabilities: bool = False,
    transforms: tuple[str, ...] = (),
) -> tuple[Request, ...]:
    """Return the requests that a call of ``module`` is expected to make.

    Args:
        sharers: ``module``, and the modules that share a computed value with it (``PatchPoint.shared_in``).
        grad: whether gradients will be computed. None means: yes, if the module is in training mode and a parameter of
            the module, or of the shared bias, requires grad.
        transforms: the transforms of ``torch.func`` around the call.
    """
    trains_bias = False
    if module.training if grad is None else grad:
        trains_bias = any(map(point.trains_bias, sharers))  # one sharer computes the bias for all sharers
    if grad is None:
        grad = module.training and (trains_bias or has_trained_parameters(module))
    dropout = module.training and point.dropout(module) > 0.0

    def complete(request: Request) -> Request:
        segments = request.segments
        if trains_bias:
            segments = tuple(replace(segment, bias_grad=segment.bias is not None) for segment in segments)
        return replace(
            request,
            segments=segments,
            dropout=dropout,
            grad=bool(grad),
            dtype=autocast_dtype(request.dtype, request.device),
            probabilities=probabilities,
            transforms=transforms,
        )

    return tuple(map(complete, point.requests(module)))


def has_trained_parameters(module: nn.Module) -> bool:
    """Whether any parameter of the module requires grad."""
    return any(parameter.requires_grad for _, parameter in parameters_of(module))


def check_model(model: object) -> None:
    """Raise unless an argument is a model."""
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError("model", type(model).__name__, "a torch.nn.Module, e.g. a Hugging Face model")


def find_sites(model: nn.Module) -> list[PatchTarget]:
    """Return every module of a model that a registered adapter can patch.

    A patch point matches modules by class, not by configuration. If points for several classes match a module, the
    class that comes first in the ``__mro__`` of the module's class decides. If several adapters have a point for this
    class, the adapter for the model's type is preferred.

    Raises:
        InvalidArgumentError: ``model`` is not a ``torch.nn.Module``.
        PatchError: no adapter supports an attention module of the model.
    """
    check_model(model)
    types = _model_types(model)
    adapters = registry.adapters()
    preferred = [adapters[name] for name in types if name in adapters]
    points: dict[str, list[tuple[Adapter, PatchPoint]]] = {}
    for adapter in {id(adapter): adapter for adapter in (*preferred, *adapters.values())}.values():
        for point in adapter.points:
            points.setdefault(point.cls, []).append((adapter, point))
    targets = []
    for name, module in model.named_modules():
        candidates = (candidate for cls in type(module).__mro__ for candidate in points.get(path_of(cls), ()))
        for adapter, point in candidates:
            if point.serves(module):
                targets.append(PatchTarget(name, module, point, adapter, point.owner(model, module)))
                break
    if not any(target.point.attends for target in targets):
        raise _no_site_error(model, types, points)
    return targets


def _model_types(model: nn.Module) -> tuple[str, ...]:
    configs = (getattr(module, "config", None) for module in model.modules())
    names = (getattr(config, "model_type", None) for config in configs)
    return tuple(dict.fromkeys(str(name) for name in names if name))


def _no_site_error(model: nn.Module, types: tuple[str, ...], points: Iterable[str]) -> PatchError:
    """Return the error for a model without sites. The text includes possible reasons, such as a broken adapter."""
    reasons = [f"{name}: {reason}" for name, reason in registry.broken_adapters().items()]
    why = f" (an adapter exists but did not load: {shorten('; '.join(reasons), 200)})" if reasons else ""
    known = {path.rpartition(":")[2]: path for path in points if path != path_of(nn.Module)}
    for cls in (cls for module in model.modules() for cls in type(module).__mro__):
        if cls.__name__ in known:
            why += f" ({path_of(cls)} is another class than {known[cls.__name__]})"
            break
    return PatchError(
        f"model: got {type(model).__name__} of model type {', '.join(types) or 'none (no config)'}, "
        f"but no adapter supports its attention modules{why}; allowed: modules that call transformers' "
        f"AttentionInterface, attention modules of the model types {_names_of_types()}, and modules of an adapter of "
        "yours (attnzoo.register_adapter)"
    )


def _names_of_types() -> str:
    return ", ".join(name for name in registry.model_types() if name != ANY_MODEL_TYPE)
