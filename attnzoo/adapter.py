"""Where: what an adapter tells of a model family.

An adapter lists *points*. A point is one class of modules that attend, and the narrowest place at which its attention can
be taken over: a function that turns the module's inputs into an ``Attention``, hands it to an
:class:`Attend`, and returns the result as the model expects it. Adapters know no backend by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from attnzoo.errors import DriftError
from attnzoo.originals import slots
from attnzoo.originals.drift import bypassed, drift, message
from attnzoo.originals.fingerprint import locate
from attnzoo.spec.segments import Attention, Request, Result

T = TypeVar("T")


class Attend(Protocol):
    """What a point's forward gets to compute attentions with.

    Attributes:
        complete: whether all sites that share values with this one (:attr:`PatchPoint.shared_in`) are patched at the moment,
            and none may run the model's own code: only then can they hand one another values of their own kind.
    """

    @property
    def complete(self) -> bool: ...

    def __call__(self, attention: Attention, probabilities: bool = False) -> Result:
        """Run an attention on the site's backend."""

    def takes(self, attention: Attention) -> bool:
        """Whether the site's backend would run an attention: for choosing between two ways to say the same."""

    def falls_back(self, can: bool = True) -> bool:
        """After a refusal: whether to run the model's own code instead, if it ``can`` serve; counts it if so."""

    def cached_per_forward(self, tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
        """``make(tensor)``, computed once per tensor for all sites of the patch: per forward, not per layer.

        To be asked once per forward and name: a site that asks again is taken to be in the next forward. The name says
        what ``make`` goes by besides the tensor: the model of a patch may have parts that differ in it.
        """


Forward = Callable[..., Any]


def bind_function(function: Forward) -> Callable[[type, Attend], Forward]:
    """``PatchPoint.bind`` of a forward that is a plain function ``function(module, attend, *args, **kwargs)``.

    Example:
        >>> bind = bind_function(lambda module, attend, states: attend(module.attention_of(states)).output)
    """

    def bind(cls: type, attend: Attend) -> Forward:
        return lambda module, *args, **kwargs: function(module, attend, *args, **kwargs)

    return bind


def _no_requests(module: nn.Module) -> tuple[Request, ...]:
    return ()


def _asks_for_probabilities(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs.get("output_attentions"))


def _always(module: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class PatchPoint:
    """One class of attention modules and how to take its attention over.

    Attributes:
        cls: ``"package.module:Class"``; modules of exactly this class, or subclasses that keep its forward.
        bind: ``bind(cls, attend)`` returns the forward that replaces that of the class in one module. It is called as
            a method is, with the module first. That module may be a copy of the patched module.
        describe: the site's pattern, for people.
        requests: what the module will ask of a backend, as far as its weights and configuration tell.
        trains_bias: whether the module has a bias of its own that is not frozen.
        dropout: the attention dropout the module applies in training.
        verified: ``{"package.module:Class.method": fingerprints}`` of the original functions this point relies on.
        check: raises if the module is configured in a way the point cannot serve.
        wants_probabilities: whether a call with these keyword arguments asks for attention probabilities.
        when: which modules of the class the point is for, where that is not all of them.
        fault: why the module's own forward is wrong, or None; there is no falling back to a forward that is.
        replay: ``replay(output)`` gives the keyword arguments that make the module repeat the random choices of the
            call that returned this output (the hash buckets of LSH attention); None: it makes none.
        backward_in_training: the model's own backward works in training mode only.
        shared_in: ``"package.module:Class"`` of the module in which the sites of this point hand values to one another
            (a bias that the first layer of a stack computes for all of them), or None. Of a module that attends
            nothing: the module with whose sites it is taken over; None: with those inside itself.
        attends: False for a module that attends nothing itself and is taken over with those inside it, because what it
            makes for them is wrong or larger than they need; it is not listed as a site.
    """

    cls: str
    bind: Callable[[type, Attend], Forward]
    describe: Callable[[Any], str]
    verified: Mapping[str, tuple[str, ...]]
    requests: Callable[[Any], tuple[Request, ...]] = _no_requests
    trains_bias: Callable[[Any], bool] = lambda module: False
    dropout: Callable[[Any], float] = lambda module: 0.0
    check: Callable[[Any], None] = lambda module: None
    wants_probabilities: Callable[[Any, Mapping[str, Any]], bool] = _asks_for_probabilities
    when: Callable[[Any], bool] = _always
    fault: Callable[[Any], str | None] = lambda module: None
    replay: Callable[[Any], dict[str, Any]] | None = None
    backward_in_training: bool = False
    shared_in: str | None = None
    attends: bool = True

    def matches(self, module: nn.Module) -> bool:
        """Whether the point is for the module: one of its class (subclasses included), :attr:`when` that says so."""
        return any(path_of(base) == self.cls for base in type(module).__mro__) and self.when(module)

    def owner(self, model: nn.Module, module: nn.Module) -> nn.Module | None:
        """The module of the model in which a module shares values with others (:attr:`shared_in`), if it is there."""
        if self.shared_in is None:
            return None
        for owner in model.modules():
            shares = any(path_of(base) == self.shared_in for base in type(owner).__mro__)
            if shares and any(found is module for found in self.sharers(owner)):
                return owner
        return None

    def sharers(self, owner: nn.Module) -> tuple[nn.Module, ...]:
        """The modules that share values in an owner."""
        return tuple(found for found in owner.modules() if self.matches(found))


@dataclass(frozen=True)
class Adapter:
    """What attnzoo knows of a model family.

    Attributes:
        model_types: ``config.model_type`` values it serves. Its points match by class in any model; the type decides
            between adapters that know the same class.
        points: the attention classes of the family.
        versions: the transformers versions it was verified against, for people.
        examples: what to change of the default configuration to see the family's modules: in one example or the other,
            every point has one. The support matrix is made of them.
    """

    model_types: tuple[str, ...]
    points: tuple[PatchPoint, ...]
    versions: str = field(default="unknown")
    examples: tuple[Mapping[str, Any], ...] = ({},)

    def check_drift(self, point: PatchPoint, module: nn.Module | None = None) -> None:
        """Raise unless the functions the point relies on are those it was verified against.

        Args:
            point: one of the adapter's.
            module: one of the point's; its class must not override the forward, or a method the point relies on.

        Raises:
            DriftError: a function is gone, or was changed by a subclass, at run time or by another version; the message
                says which.
        """
        differences = drift(point.verified)
        if not differences:
            base = locate(point.cls)
            differences = bypassed(base if module is None else type(module), base, point.verified)
        if differences:
            import transformers

            family = ", ".join(self.model_types)
            raise DriftError(message(differences, family, self.versions, transformers.__version__))


def path_of(cls: type) -> str:
    """A class as points name it: ``"package.module:Class"``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def parameters_of(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every parameter of a module, with the module inside it that holds the parameter.

    Replicas of ``nn.DataParallel`` list none: theirs are plain tensors, which only a private attribute tells
    (torch/nn/parallel/replicate.py). Where that is gone, a replica is taken for a module without parameters.
    """
    for owner in module.modules():
        replicated = vars(owner).get("_former_parameters") or {}
        for parameter in (*owner.parameters(recurse=False), *replicated.values()):
            yield owner, parameter


def parameter_of(module: nn.Module) -> Tensor:
    """A floating-point parameter of the module, or an empty tensor like it: tells device and dtype when it runs.

    Weights that accelerate offloads are on the meta device between forwards; told is the device they are brought to.
    """
    for owner, parameter in parameters_of(module):
        if parameter.is_floating_point():
            brought = slots.runs_on(owner) or slots.runs_on(module) if parameter.is_meta else None
            return parameter if brought is None else torch.empty(0, dtype=parameter.dtype, device=brought)
    return torch.empty(0)
