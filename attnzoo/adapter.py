"""The interface of patch points and adapters. An adapter lists the patch points of one model family.

A patch point replaces the forward of one class of modules. The new forward turns its inputs into an ``Attention``,
calls an :class:`Attend`, and returns what the original forward returns. Adapters do not depend on backends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """A callable that computes the attentions of one patched module.

    Attributes:
        complete: True if every module that shares values with this module (:attr:`PatchPoint.shared_in`) is patched and
            cannot fall back to the original forward. If False, an original forward may read the values, so the module
            must pass them on in the original format.
    """

    @property
    def complete(self) -> bool: ...

    def __call__(self, attention: Attention, probabilities: bool = False) -> Result:
        """Run an attention on the backend of the module."""

    def takes(self, attention: Attention) -> bool:
        """Whether the backend supports an attention. Adapters use this to choose between equivalent attentions."""

    def falls_back(self, can: bool = True) -> bool:
        """Return whether to run the original code after a refusal. attnzoo counts each result True as a fallback.

        Args:
            can: whether the original code supports the inputs. If not, or without ``fallback="native"``, the result is
                False.
        """

    def cached_per_forward(self, tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
        """Return ``make(tensor)``, computed once per forward of the model and shared by all layers of the patch.

        A module may request a name only once per forward of the model. attnzoo takes a second request by the same
        module as the start of the next forward, and computes the result again.

        Args:
            tensor: the input of ``make``, such as an attention mask.
            name: the name of the result. If the result depends on more than ``tensor``, the name must contain these
                other values, because they may differ between layers.
            make: the function that computes the result.
        """


class PatchPoint(ABC):
    """One class of modules in a model family, and the forward that a patch gives to these modules.

    To support a class of modules, write a subclass of ``PatchPoint``. Set :attr:`cls` and :attr:`verified`, and define
    :meth:`describe`, :meth:`requests` and :meth:`forward`. Override other methods if their defaults are wrong for the
    modules. Put an instance of the subclass into :attr:`Adapter.points`.

    Attributes:
        cls: the class as ``"package.module:Class"``. The point also serves subclasses that inherit the forward.
        verified: ``{"package.module:Class.method": (fingerprint, ...)}`` of every original function that the point
            replaces, calls or imitates. ``attnzoo fingerprint`` prints fingerprints. A patch refuses changed functions.
        shared_in: the class of the module whose layers share values, as ``"package.module:Class"``. For example, the
            first layer computes a bias for all layers. None means that the layers share nothing.
        attends: whether the module computes attention. False means a companion, such as a module that makes masks. A
            companion is not a site. A patch includes a companion only if the patch includes a site inside the companion
            or, with ``shared_in``, a site inside the companion's :meth:`owner`.
        makes_random_choices: whether the forward draws random numbers that decide which tokens attend to one another,
            as hashing does. :meth:`replay` repeats these choices.
        backward_in_training: whether the original backward works only in training mode.
        cache: the names of the forward's keyword argument that contains the cache. Releases of transformers differ.
        states: the name of the forward's first argument, which contains the hidden states.
        traceable: whether ``torch.compile`` and ``torch.export`` can trace the forward, i.e. the forward does not
            branch on values of tensors where :func:`~attnzoo.spec.transforms.readable` is False. If not, the module
            runs uncompiled between two graphs, and cannot be exported.

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
    cache: tuple[str, ...] = ("cache", "past_key_values")
    states: str = "hidden_states"
    traceable: bool = False

    # Subclasses define the next methods.

    @abstractmethod
    def describe(self, module: Any) -> str:
        """Return the module's attention pattern in words, such as ``"causal"``."""

    def requests(self, module: Any) -> tuple[Request, ...]:
        """Return the requests that follow from the weights and the configuration of the module.

        A patch refuses a backend that cannot serve one of these requests. Leave out dropout, gradients and transforms,
        because attnzoo adds these properties for each call.
        """
        return ()

    def forward(self, module: Any, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        """Compute the output of the module. A patch calls this method instead of the original forward.

        Args:
            module: the called module, which may be a copy of the patched module. Do not store this reference, because
                Python could then not free the model.
            attend: the callable that computes attentions on the module's backend.
            *args: the arguments of the original forward. A subclass must declare each argument by name.
            **kwargs: the keyword arguments of the original forward.
        """
        raise NotImplementedError(f"{type(self).__name__}: got neither forward nor bind; allowed: override one of them")

    # Subclasses override the next methods if the default is wrong.

    def bind(self, cls: Any, attend: Attend) -> Forward:
        """Return a function ``function(module, *args, **kwargs)`` that replaces the forward of one module.

        Override ``bind`` instead of :meth:`forward` to prepare data once per module.

        Args:
            cls: the class of the module.
            attend: the callable that computes attentions on the module's backend.
        """
        return lambda module, *args, **kwargs: self.forward(module, attend, *args, **kwargs)

    def serves(self, module: Any) -> bool:
        """Whether the point serves this module. Override this if the point serves only some modules of the class."""
        return True

    def check(self, module: Any) -> None:  # noqa: B027  (the default accepts every configuration)
        """Raise if the point cannot serve the configuration of the module."""

    def verified_class(self, module: Any) -> type:
        """Return the class whose methods the class of the module must not override. The default is :attr:`cls`."""
        cls: type = object_at(self.cls)
        return cls

    def fault(self, module: Any) -> str | None:
        """Return why the original forward of the module is wrong, or None. attnzoo never falls back to wrong code."""
        return None

    def original_serves(self, module: Any, *args: Any, **kwargs: Any) -> bool:
        """Whether the original forward computes the right result for these arguments of a call.

        ``auto`` runs the original forward only if the result is True. Override this method if a patched module passes
        values to the next module in another format than the original, or if the original is wrong or raises for some
        arguments. The method runs once per call, so it must be fast.
        """
        return True

    def original_kernel(self, module: Any) -> str:
        """Return the name of the attention function that the original forward calls: ``"eager"`` or ``"sdpa"``."""
        return "eager"

    @final
    def cache_in(self, kwargs: Mapping[str, Any]) -> Any:
        """Return the cache in the keyword arguments of a call, or None."""
        for name in self.cache:  # a loop, because each call of a patched module runs it
            if (cache := kwargs.get(name)) is not None:
                return cache
        return None

    def cached_tokens(self, module: Any, cache: Any) -> int:
        """Return the number of keys in ``cache`` that the module attends to. A static cache counts as full.

        ``auto`` selects by this number. The number affects speed only, so 0 is right for caches of unknown types.
        """
        # The length that a static cache reports may be a tensor on a GPU. The size of the keys needs no wait.
        layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
        index = getattr(module, "layer_idx", None) or 0
        keys = getattr(layers[index], "keys", None) if index < len(layers) else None
        return int(keys.shape[-2]) if isinstance(keys, Tensor) and keys.ndim >= 2 else 0

    def dropout(self, module: Any) -> float:
        """Return the dropout probability that the module applies to softmax weights in training."""
        return 0.0

    def mode(self, module: Any) -> object:
        """Return a hashable value of everything that can change the requests of a module between two calls.

        The weights and the configuration of the module are not part of the value. Neither are gradients and autocast.
        """
        return module.training

    def trains_bias(self, module: Any) -> bool:
        """Whether the module has a learned attention bias that is not frozen."""
        return False

    def wants_probabilities(self, module: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call with these keyword arguments requests attention probabilities."""
        return bool(kwargs.get("output_attentions"))

    def replay(self, output: Any) -> dict[str, Any]:
        """Return keyword arguments that make a call repeat the random choices of the call that returned ``output``."""
        return {}

    # Subclasses do not override the next methods.

    @final
    def states_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the hidden states in the arguments of a call of the forward, or None if they are missing."""
        return args[0] if args else kwargs.get(self.states)

    @final
    def matches(self, module: nn.Module) -> bool:
        """Whether the module is an instance of the point's class and the point serves the module."""
        return _is_a(module, self.cls) and self.serves(module)

    @final
    def owner(self, model: nn.Module, module: nn.Module) -> nn.Module | None:
        """Return the module of class :attr:`shared_in` that contains ``module``, or None if no such module exists."""
        if self.shared_in is None:
            return None
        for owner in model.modules():
            if _is_a(owner, self.shared_in) and any(sharer is module for sharer in self.sharers(owner)):
                return owner
        return None

    @final
    def sharers(self, owner: nn.Module) -> tuple[nn.Module, ...]:
        """Return the modules inside ``owner`` that share values with one another."""
        return tuple(module for module in owner.modules() if self.matches(module))


@dataclass(frozen=True)
class Adapter:
    """The patch points of a model family.

    Attributes:
        model_types: the ``config.model_type`` values of the family. Points match modules by class in any model. The
            model type only decides between two adapters with points for the same class. ``"*"`` is the model type of
            an adapter that serves modules of any model.
        points: instances of :class:`PatchPoint` subclasses.
        versions: the transformers versions that the points were verified against, as text for messages.
        examples: changes to the default configuration, one per example model. The example models together must contain
            a module for every point. The support matrix is generated from these models. An adapter for ``"*"`` names
            the ``model_type`` of each example.

    Raises:
        InvalidArgumentError: one of ``points`` is not a :class:`PatchPoint` with a ``cls``, or its ``cache`` is no
            tuple.

    Example:
        >>> from attnzoo.adapters.gpt_neox import SelfAttention
        >>> adapter = Adapter(model_types=("gpt_neox",), points=(SelfAttention(),), versions="5.17 to 5.24")
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
            names: object = point.cache
            if not isinstance(names, tuple):
                raise InvalidArgumentError(f"{type(point).__name__}.cache", repr(names), "a tuple of names")

    def check_drift(self, point: PatchPoint, module: nn.Module | None = None) -> None:
        """Raise if the functions of ``point.verified`` have changed since the point was verified.

        Args:
            point: a point of the adapter.
            module: a module that the point serves. The class of the module must not override the forward or another
                method in ``verified``. None means that only the class of the point is checked.

        Raises:
            DriftError: a function is missing, overridden, replaced at run time, or differs from the verified function.
        """
        differences = find_drift(point.verified)
        if not differences:
            base = object_at(point.cls) if module is None else point.verified_class(module)
            differences = find_bypassed(base if module is None else type(module), base, point.verified)
        if differences:
            import transformers

            family = ", ".join(self.model_types)
            raise DriftError(drift_message(differences, family, self.versions, transformers.__version__))


def _is_a(module: nn.Module, path: str) -> bool:
    return any(path_of(base) == path for base in type(module).__mro__)


def parameters_of(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield ``(submodule, parameter)`` for every parameter of a module and of each submodule.

    A replica of ``nn.DataParallel`` has no parameters. The replica stores tensors in a private attribute instead
    (torch/nn/parallel/replicate.py). If torch removes this attribute, the function yields nothing for a replica.
    """
    for owner in module.modules():
        replicated = vars(owner).get("_former_parameters") or {}
        for parameter in (*owner.parameters(recurse=False), *replicated.values()):
            yield owner, parameter


def parameter_of(module: nn.Module) -> Tensor:
    """Return a floating-point tensor that has the dtype and device of the module's weights during a forward.

    accelerate keeps offloaded weights on the meta device between forwards. For these weights, the result is an empty
    tensor on the device to which accelerate moves the weights.
    """
    for owner, parameter in parameters_of(module):
        if parameter.is_floating_point():
            device = slots.runs_on(owner) or slots.runs_on(module) if parameter.is_meta else None
            return parameter if device is None else torch.empty(0, dtype=parameter.dtype, device=device)
    return torch.empty(0)


def request_for(module: nn.Module, heads: int, head_dim: int, *segments: SegmentRequest) -> Request:
    """Return the request for one attention of a module, with the device and the dtype of the module's weights."""
    parameter = parameter_of(module)
    return Request(parameter.device.type, parameter.dtype, heads, head_dim, head_dim, segments)
