"""Where a backend is used: patch points, and the adapter that lists the patch points of a model family.

A patch point is one class of modules and the narrowest place at which a patch can take over their attention. Its
forward turns the module's inputs into an ``Attention``, calls an :class:`Attend` with it, and returns what the module's
original forward returns. Adapters name no backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

from attnzoo.errors import DriftError, InvalidArgumentError
from attnzoo.originals import slots
from attnzoo.originals.drift import drift_message, find_bypassed, find_drift
from attnzoo.originals.fingerprint import object_at, path_of
from attnzoo.spec.segments import Attention, Request, Result, SegmentRequest

T = TypeVar("T")
Forward = Callable[..., Any]


class Attend(Protocol):
    """Computes the attentions of one patched module.

    Attributes:
        complete: whether every module that shares values with this module (:attr:`PatchPoint.shared_in`) is patched and
            none of them may fall back to its original forward. Only then may they pass values in another format.
    """

    @property
    def complete(self) -> bool: ...

    def __call__(self, attention: Attention, probabilities: bool = False) -> Result:
        """Run an attention on the backend of the module."""

    def takes(self, attention: Attention) -> bool:
        """Whether the backend would run an attention. Use it to choose between two equivalent descriptions."""

    def falls_back(self, can: bool = True) -> bool:
        """Whether to run the original code after a refusal. Counts a fallback if the answer is yes.

        Args:
            can: whether the original code can serve this call.
        """

    def cached_per_forward(self, tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
        """Return ``make(tensor)``, computed once per forward of the model and shared by all layers of the patch.

        Call it once per forward and name: a second call of the same module starts the next forward.

        Args:
            tensor: what ``make`` reads, such as an attention mask.
            name: identifies the result. Include every other value that ``make`` depends on, since parts of one model
                may differ in it.
            make: computes the result.
        """


class PatchPoint(ABC):
    """One class of modules in a model family, and how a patch takes over its forward.

    To support a class, write a subclass: set :attr:`cls` and :attr:`verified`, and define :meth:`describe`,
    :meth:`requests` and :meth:`forward`. Override the other methods where their default is wrong for the class. Put an
    instance into :attr:`Adapter.points`.

    Attributes:
        cls: ``"package.module:Class"``. The point serves this class and subclasses that keep its forward.
        verified: ``{"package.module:Class.method": (fingerprint, ...)}`` of every original function the point relies
            on: those it replaces, calls or imitates. ``attnzoo fingerprint`` prints them. A patch refuses other code.
        shared_in: ``"package.module:Class"`` of the module whose layers share values, such as a bias that the first
            layer computes for all layers. None if the layers share nothing.
        attends: whether the module computes attention. Use False for a module that is patched only because of the
            attention inside it, such as a model whose masks need a check; with ``shared_in``, because of the attention
            anywhere in that module. Such a module is not listed as a site.
        makes_random_choices: whether the forward draws random numbers that decide which tokens attend to one another,
            as hashing does. :meth:`replay` then repeats them.
        backward_in_training: whether the original backward works in training mode only.

    Example:
        >>> from attnzoo import Attention, Full, PatchPoint, Request, Segment, SegmentRequest
        >>> class OneHead(PatchPoint):
        ...     cls = "package.modeling:OneHeadAttention"
        ...
        ...     def describe(self, module):
        ...         return "full"
        ...
        ...     def requests(self, module):
        ...         weight, dim = module.query.weight, module.dim
        ...         segment = SegmentRequest(Full(), kv_heads=1)
        ...         return (Request(weight.device.type, weight.dtype, 1, dim, dim, (segment,)),)
        ...
        ...     def forward(self, module, attend, states):
        ...         query, key, value = (layer(states)[:, None] for layer in (module.query, module.key, module.value))
        ...         return attend(Attention(query, (Segment(key, value),), module.dim**-0.5)).output[:, 0]
        >>> OneHead().dropout(module=None)
        0.0
    """

    cls: str
    verified: Mapping[str, tuple[str, ...]] = {}
    shared_in: str | None = None
    attends: bool = True
    makes_random_choices: bool = False
    backward_in_training: bool = False

    # A subclass defines these.

    @abstractmethod
    def describe(self, module: Any) -> str:
        """Return the module's attention pattern in words, such as ``"causal"``."""

    def requests(self, module: Any) -> tuple[Request, ...]:
        """Return what the module will request of a backend, as far as its weights and configuration tell.

        A patch refuses a backend that cannot serve one of them. Set no dropout, gradients or transforms: attnzoo adds
        these for each call.
        """
        return ()

    def forward(self, module: Any, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        """Replace the module's forward.

        Args:
            module: the module that is called, which may be a copy of the patched module. Do not store it: a reference
                would keep a model alive after its last user dropped it.
            attend: computes attentions on the module's backend.
            *args, **kwargs: the arguments of the original forward. Declare them by name.
        """
        raise NotImplementedError(f"{type(self).__name__}: got neither forward nor bind; allowed: one of them")

    # A subclass overrides these where the default is wrong.

    def bind(self, cls: Any, attend: Attend) -> Forward:
        """Return the function that replaces the forward of one module, called as ``function(module, *args, **kwargs)``.

        Override it, instead of :meth:`forward`, to prepare something once per module.

        Args:
            cls: the class of the module.
            attend: as for :meth:`forward`.
        """
        return lambda module, *args, **kwargs: self.forward(module, attend, *args, **kwargs)

    def serves(self, module: Any) -> bool:
        """Whether the point is for this module of the class. Override it if it is not for all of them."""
        return True

    def check(self, module: Any) -> None:  # noqa: B027  (the default accepts every configuration)
        """Raise if the point cannot serve the configuration of the module."""

    def fault(self, module: Any) -> str | None:
        """Return why the original forward is wrong, or None. Nothing falls back to a wrong forward."""
        return None

    def dropout(self, module: Any) -> float:
        """Return the attention dropout that the module applies in training."""
        return 0.0

    def trains_bias(self, module: Any) -> bool:
        """Whether the module has a learned attention bias that is not frozen."""
        return False

    def wants_probabilities(self, module: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call with these keyword arguments asks for attention probabilities."""
        return bool(kwargs.get("output_attentions"))

    def replay(self, output: Any) -> dict[str, Any]:
        """Return keyword arguments that make the module repeat the random choices of the call with this output."""
        return {}

    # No subclass overrides these.

    @final
    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of the point's class, or a subclass, and the point serves it."""
        return _is_a(module, self.cls) and self.serves(module)

    @final
    def owner(self, model: nn.Module, module: nn.Module) -> nn.Module | None:
        """Return the module of the model in which a module shares values (:attr:`shared_in`), or None."""
        if self.shared_in is None:
            return None
        for owner in model.modules():
            if _is_a(owner, self.shared_in) and any(sharer is module for sharer in self.sharers(owner)):
                return owner
        return None

    @final
    def sharers(self, owner: nn.Module) -> tuple[nn.Module, ...]:
        """Return the modules that share values in an owner."""
        return tuple(module for module in owner.modules() if self.matches(module))


@dataclass(frozen=True)
class Adapter:
    """The patch points of a model family.

    Attributes:
        model_types: ``config.model_type`` values of the family. Points match by class in any model; the model type only
            decides between adapters with points for the same class.
        points: instances of :class:`PatchPoint` subclasses.
        versions: the transformers versions the points were verified against, for people.
        examples: changes of the default configuration that together build a module for every point. The support matrix
            is generated from them.

    Raises:
        InvalidArgumentError: one of ``points`` is not a :class:`PatchPoint` with a ``cls``.

    Example:
        >>> from attnzoo.adapters.gpt_neox import SelfAttention
        >>> adapter = Adapter(model_types=("gpt_neox",), points=(SelfAttention(),), versions="5.17 to 5.23")
        >>> adapter.check_drift(adapter.points[0])
    """

    model_types: tuple[str, ...]
    points: tuple[PatchPoint, ...]
    versions: str = field(default="unknown")
    examples: tuple[Mapping[str, Any], ...] = ({},)

    def __post_init__(self) -> None:
        for point in self.points:
            if not isinstance(point, PatchPoint) or not getattr(point, "cls", ""):
                got = getattr(point, "__name__", type(point).__name__)
                raise InvalidArgumentError("points", got, "instances of PatchPoint subclasses that set cls")

    def check_drift(self, point: PatchPoint, module: nn.Module | None = None) -> None:
        """Raise unless the functions a point relies on are those it was verified against.

        Args:
            point: a point of the adapter.
            module: a module the point serves. Its class must not override the forward or another method in
                ``verified``.

        Raises:
            DriftError: a function is missing, or was changed by a subclass, at run time or by another version. The
                message says which.
        """
        differences = find_drift(point.verified)
        if not differences:
            base = object_at(point.cls)
            differences = find_bypassed(base if module is None else type(module), base, point.verified)
        if differences:
            import transformers

            family = ", ".join(self.model_types)
            raise DriftError(drift_message(differences, family, self.versions, transformers.__version__))


def _is_a(module: nn.Module, path: str) -> bool:
    return any(path_of(base) == path for base in type(module).__mro__)


def parameters_of(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield every parameter of a module, with the submodule that holds it.

    Replicas of ``nn.DataParallel`` list no parameters: they hold plain tensors in a private attribute
    (torch/nn/parallel/replicate.py). If torch removes that attribute, a replica seems to have no parameters.
    """
    for owner in module.modules():
        replicated = vars(owner).get("_former_parameters") or {}
        for parameter in (*owner.parameters(recurse=False), *replicated.values()):
            yield owner, parameter


def parameter_of(module: nn.Module) -> Tensor:
    """Return a floating-point tensor with the dtype and device of the module's weights when it runs.

    accelerate keeps offloaded weights on the meta device between forwards. For those, the result is an empty tensor on
    the device to which accelerate moves them.
    """
    for owner, parameter in parameters_of(module):
        if parameter.is_floating_point():
            device = slots.runs_on(owner) or slots.runs_on(module) if parameter.is_meta else None
            return parameter if device is None else torch.empty(0, dtype=parameter.dtype, device=device)
    return torch.empty(0)


def request_for(module: nn.Module, heads: int, head_dim: int, *segments: SegmentRequest) -> Request:
    """Return the request of a module for one attention, on the device and in the dtype of its weights."""
    parameter = parameter_of(module)
    return Request(parameter.device.type, parameter.dtype, heads, head_dim, head_dim, segments)
