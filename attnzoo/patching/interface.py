"""Base class of patch points for modules that get their attention function from transformers' ``AttentionInterface``.

The forward of such a module calls ``ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, ...)``. Several
models may share the global ``ALL_ATTENTION_FUNCTIONS`` and the config, so a patch changes neither. A patched module
runs a copy of its original forward, in which ``ALL_ATTENTION_FUNCTIONS`` has another value. Projections, rotary
embeddings and caching remain the model's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend, Forward, PatchPoint
from attnzoo.errors import BackendRefusedError, KeywordRefusedError, PatchError
from attnzoo.functional import compute_dtype
from attnzoo.patching.keywords import UNCOMPUTED, parameters, refuse_uncomputed
from attnzoo.spec.documents import attend_documents
from attnzoo.spec.masks import NO_MASK, ReadMask, read_attention_mask
from attnzoo.spec.patterns import Causal
from attnzoo.spec.segments import Attention, Segment

_NAME = "ALL_ATTENTION_FUNCTIONS"
_CAUSAL = NO_MASK._replace(pattern=Causal(offset=0))
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def rebind(function: Callable[..., Any], **names: Any) -> FunctionType:
    """Return a copy of a function in which the given global names have the given values.

    All remaining globals keep their current values. Decorators of the function also run around the copy. For example,
    transformers renames deprecated arguments in a decorator.

    Raises:
        PatchError: ``function`` is not a plain Python function, a decorator does not keep the decorated function in a
            closure, or the function does not use one of the names.
    """
    decorated = getattr(function, "__wrapped__", None)
    if decorated is not None:
        return _decorate(function, decorated, rebind(decorated, **names))
    if not isinstance(function, FunctionType) or any(name not in function.__code__.co_names for name in names):
        raise PatchError(f"function: got {function!r}; allowed: a Python function that uses globals {sorted(names)}")
    # torch.compile imports the module that the globals name, and reads globals there. Without this name, it reads the
    # globals of the function.
    names = {**function.__globals__, **names}
    names.pop("__name__", None)
    return _copy(function, names, function.__closure__)


def _decorate(wrapper: Callable[..., Any], decorated: Callable[..., Any], other: FunctionType) -> FunctionType:
    """Return a copy of a decorator's ``wrapper`` that calls ``other`` instead of the function ``decorated``."""
    cells = (wrapper.__closure__ or ()) if isinstance(wrapper, FunctionType) else ()
    closure = tuple(CellType(other) if _contains(cell, decorated) else cell for cell in cells)
    if not isinstance(wrapper, FunctionType) or not any(_contains(cell, decorated) for cell in cells):
        allowed = "a decorated function that keeps the original function in its closure"
        raise PatchError(f"decorator: got {wrapper!r}; allowed: {allowed}")
    twin = _copy(wrapper, wrapper.__globals__, closure)
    vars(twin)["__wrapped__"] = other
    return twin


def _contains(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def _copy(function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    # torch.compile stores compiled code by code object, and looks the compiled functions up in the globals. With a
    # shared code object, the second of two rebound functions would look in the globals of the first.
    twin = FunctionType(function.__code__.replace(), names, function.__name__, function.__defaults__, closure)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__module__ = function.__module__
    return twin


class InterfacePoint(PatchPoint):
    """Patch point of a module that gets its attention function from ``AttentionInterface``.

    A patch changes only the attention function of the forward. A subclass sets ``cls`` and ``verified``, and defines
    ``describe`` and ``requests``.
    """

    traceable = True

    def bind(self, cls: Any, attend: Attend) -> Forward:
        # Reading the config takes several microseconds, so :meth:`compute` gets the answer instead of asking again.
        constants = self.constants_of(cls)
        plain = self.bind_interface(cls, attend, output_attentions=False, **constants)
        with_probabilities = self.bind_interface(cls, attend, output_attentions=True, **constants)

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            run = with_probabilities if self.computes_probabilities(module, kwargs) else plain
            return run(module, *args, **kwargs)

        return forward

    def bind_interface(self, cls: Any, attend: Attend, **more: Any) -> Forward:
        """Return a copy of the original forward in which :meth:`compute` is the attention function.

        Each call of :meth:`compute` also gets the keyword arguments ``more``.
        """
        original = inspect.unwrap(cls.forward).__globals__.get(_NAME)
        return rebind(cls.forward, **{_NAME: _AttentionFunctions(self, attend, original, more)})

    def compute(
        self,
        module: Any,
        attend: Attend,
        implementation: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute an attention in place of an attention function of transformers.

        Args:
            module, attend: as for :meth:`PatchPoint.forward`.
            implementation: ``"eager"`` or ``"sdpa"``, which decides the format of ``attention_mask``.
            query, key, value, attention_mask, scaling, dropout, is_causal: as in transformers.
            output_attentions: whether to return the attention weights.
            kwargs: the remaining keyword arguments of the module's forward.

        Returns:
            The output ``(batch, q_len, heads, head_dim)``, and the attention weights or None.
        """
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        read = read_interface_mask(attend, implementation, query, key, attention_mask, is_causal)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_read(attend, read, query, key, value, scale, dropout, output_attentions)

    def constants_of(self, cls: Any) -> Mapping[str, Any]:
        """Return the keyword arguments that :meth:`compute` gets in every call of a module of class ``cls``."""
        return {}

    def original_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for a fallback to the original attention function. The default is ``kwargs``."""
        return kwargs

    def check(self, module: Any) -> None:
        """Raise unless the model builds masks for ``eager`` or ``sdpa``. :meth:`compute` cannot read other masks."""
        # The attribute is private, but the module's forward and transformers' mask functions also read this attribute.
        _check_implementation(module.config._attn_implementation)

    def original_kernel(self, module: Any) -> str:
        return str(module.config._attn_implementation)

    def computes_probabilities(self, module: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call of the patched module computes probabilities. A call in a graph never does.

        A patch has asked :meth:`wants_probabilities` before it lets a compiler trace a call. The compiler cannot trace
        that method.
        """
        return not torch.compiler.is_compiling() and self.wants_probabilities(module, kwargs)

    def wants_probabilities(self, module: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call requests probabilities: by the keyword ``output_attentions`` or, without it, by the config."""
        keyword = kwargs.get("output_attentions")
        return _asks_for_probabilities(module.config) if keyword is None else bool(keyword)


def _asks_for_probabilities(config: Any) -> bool:
    """Return ``config.output_attentions``.

    A config of transformers runs eight Python functions to read this property, which takes as long as all checks of a
    decoding step. So read the private attribute behind the property, if there is one.
    """
    try:
        return bool(object.__getattribute__(config, "_output_attentions"))
    except AttributeError:
        return bool(getattr(config, "output_attentions", False))


class _AttentionFunctions:
    """Replacement for the global ``ALL_ATTENTION_FUNCTIONS`` in the forward of one module."""

    def __init__(self, point: InterfacePoint, attend: Attend, interface: Any, more: Mapping[str, Any]) -> None:
        self._point, self._attend, self._interface, self._more = point, attend, interface, more
        self._functions: dict[tuple[str, AttentionFunction], AttentionFunction] = {}
        torch.compiler.assume_constant_result(_refused_keywords)  # the compiler cannot trace ``inspect``

    def get_interface(self, name: str, default: AttentionFunction) -> AttentionFunction:
        _check_implementation(name)
        # Ask every time, because users may register another function under the same name.
        original: AttentionFunction = self._interface.get_interface(name, default)
        if torch.compiler.is_compiling():
            return _AttentionFunction(self._point, self._attend, name, original, self._more)
        function = self._functions.get((name, original))
        if function is None:
            function = _AttentionFunction(self._point, self._attend, name, original, self._more)
            self._functions[name, original] = function
        return function


class _AttentionFunction:
    """Replacement for one attention function of transformers in the forward of one module."""

    def __init__(
        self, point: InterfacePoint, attend: Attend, name: str, original: AttentionFunction, more: Mapping[str, Any]
    ) -> None:
        self._point, self._attend, self._name, self._original, self._more = point, attend, name, original, more
        self._refused = _refused_keywords(point, original)

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        try:
            refuse_uncomputed(kwargs, self._refused)
            return self._point.compute(module, self._attend, self._name, *args, **{**kwargs, **self._more})
        except (BackendRefusedError, KeywordRefusedError):
            # The forward has already filled the cache, so only the attention function falls back to the original.
            if not self._attend.falls_back():
                raise
            return self._original(module, *args, **self._point.original_arguments(kwargs))


def _refused_keywords(point: InterfacePoint, original: AttentionFunction) -> frozenset[str]:
    return (UNCOMPUTED | parameters(original)) - parameters(point.compute)


def _check_implementation(name: str | None) -> None:
    if name not in ("eager", "sdpa"):
        raise PatchError(
            f"config._attn_implementation: got {name!r}; allowed: 'eager' or 'sdpa' (load with attn_implementation=)"
        )


def read_interface_mask(
    attend: Attend, implementation: str, query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool
) -> ReadMask:
    """Read the pattern, masks and bias from ``attention_mask``, which transformers built for ``implementation``.

    A mask of None usually hides no key. For ``sdpa`` with ``is_causal`` and several queries, None means causal
    attention: query ``i`` sees keys 0 to ``i``, as in the prefill of a static cache.
    """
    if attention_mask is None:
        causal = implementation == "sdpa" and is_causal and query.shape[2] > 1
        return _CAUSAL if causal else NO_MASK
    sizes = (query.shape[0], query.shape[2], key.shape[2])
    return attend.cached_per_forward(attention_mask, "read", lambda given: read_attention_mask(given, sizes))


def attend_read(
    attend: Attend,
    read: ReadMask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout: float,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention under the mask ``read``, which :func:`read_interface_mask` returned.

    Return output and weights, as :meth:`InterfacePoint.compute` does. The weights are None unless ``wanted`` is True.
    """
    dtype = compute_dtype(value)  # models may leave queries and keys in float32
    # The comparison is faster than three calls of `to`.
    if not (query.dtype == key.dtype == value.dtype == dtype):
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    attention = Attention(query, (Segment(key, value, *read[:4]),), scale, dropout)
    if read.documents is None:
        result = attend(attention, wanted)
    else:
        result = attend_documents(attend, attention, read.documents, wanted)
    return result.output.transpose(1, 2).contiguous(), None if result.dropped is None else result.dropped[0]
