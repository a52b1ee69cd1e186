"""The patch point of models that look their attention function up in transformers' ``AttentionInterface``.

Such a module's forward calls ``ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, ...)``. The name is a
global of the modelling file, and models may share the config, so the patch changes neither of them. The module runs its
original forward, the same code object, with this one global name bound to another object for this module only.
Projections, rotary embeddings and caching stay the model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor

from attnzoo.adapter import Attend, Forward, PatchPoint
from attnzoo.errors import BackendRefusedError, KeywordRefusedError, PatchError
from attnzoo.functional import compute_dtype
from attnzoo.patching.keywords import parameters, refuse_uncomputed
from attnzoo.spec.documents import attend_documents
from attnzoo.spec.masks import ReadMask, read_attention_mask
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Segment

_NAME = "ALL_ATTENTION_FUNCTIONS"
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def rebind(function: Callable[..., Any], **names: Any) -> FunctionType:
    """Return a function with the same code object and other values for some of its global names.

    The other globals keep the values they have now.

    Raises:
        PatchError: ``function`` is not a plain function, or does not use one of the names.
    """
    plain = inspect.unwrap(function)
    if not isinstance(plain, FunctionType) or any(name not in plain.__code__.co_names for name in names):
        raise PatchError(f"function: got {function!r}; allowed: a Python function that uses {sorted(names)}")
    names = {**plain.__globals__, **names}
    twin = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    twin.__kwdefaults__ = plain.__kwdefaults__
    return twin


class InterfacePoint(PatchPoint):
    """A module that gets its attention function from ``AttentionInterface`` and keeps the rest of its forward.

    A subclass sets ``cls`` and ``verified`` and defines ``describe`` and ``requests``.
    """

    def bind(self, cls: Any, attend: Attend) -> Forward:
        return self.bind_interface(cls, attend)

    def bind_interface(self, cls: Any, attend: Attend, **more: Any) -> Forward:
        """Return the original forward with :meth:`compute`, given ``more`` arguments, as its attention function."""
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
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention as an attention function of transformers does.

        Args:
            module, attend: as for :meth:`PatchPoint.forward`.
            implementation: ``"eager"`` or ``"sdpa"``, which decides the format of ``attention_mask``.
            query, key, value, attention_mask, scaling, dropout, is_causal: as in transformers.
            kwargs: the other keyword arguments of the module's forward.

        Returns:
            The output ``(batch, q_len, heads, head_dim)``, and the attention weights if they were asked for.
        """
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        read = read_interface_mask(attend, implementation, query, key, attention_mask, is_causal)
        dtype = compute_dtype(value)  # some models rotate or normalise queries and keys in float32 and leave them there
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        segment = Segment(key, value, read.pattern, read.key_mask, read.mask, read.bias)
        attention = Attention(query, (segment,), scale, dropout)
        result = attend_documents(attend, attention, read.documents, self.wants_probabilities(module, kwargs))
        weights = None if result.dropped is None else result.dropped[0]
        return result.output.transpose(1, 2).contiguous(), weights

    def original_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for the original attention function, which runs after a refusal."""
        return kwargs

    def check(self, module: Any) -> None:
        """Raise unless the model builds the masks of ``eager`` or ``sdpa``, the formats :meth:`compute` reads."""
        # A private field, but the one that the module's forward and the construction of masks read.
        _check_implementation(module.config._attn_implementation)

    def wants_probabilities(self, module: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether the keyword ``output_attentions`` or, without it, the config asks for attention probabilities."""
        keyword = kwargs.get("output_attentions")
        return bool(getattr(module.config, "output_attentions", False) if keyword is None else keyword)


class _AttentionFunctions:
    """Stands where the modelling file expects ``ALL_ATTENTION_FUNCTIONS``."""

    def __init__(self, point: InterfacePoint, attend: Attend, original: Any, more: Mapping[str, Any]) -> None:
        self._point, self._attend, self._original, self._more = point, attend, original, more
        self._computed = parameters(point.compute)

    def get_interface(self, name: str, default: AttentionFunction) -> AttentionFunction:
        _check_implementation(name)

        def attention_function(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            original: AttentionFunction = self._original.get_interface(name, default)
            try:
                refuse_uncomputed(kwargs, also=parameters(original), known=self._computed)
                return self._point.compute(module, self._attend, name, *args, **{**kwargs, **self._more})
            except (BackendRefusedError, KeywordRefusedError):
                # The module's cache is filled by now, so only the attention function falls back, not the forward.
                if not self._attend.falls_back():
                    raise
                return original(module, *args, **self._point.original_arguments(kwargs))

        return attention_function


def _check_implementation(name: str | None) -> None:
    if name not in ("eager", "sdpa"):
        raise PatchError(f"config._attn_implementation: got {name!r}; allowed: a model loaded with 'eager' or 'sdpa'")


def read_interface_mask(
    attend: Attend, implementation: str, query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool
) -> ReadMask:
    """Read a mask that transformers built for an implementation.

    None means different things: with ``eager`` nothing is hidden. With ``sdpa`` the model relies on ``is_causal``,
    which torch aligns with key 0 (a prefill into an empty static cache), unless there is one query (decoding).
    """
    if attention_mask is None:
        causal = implementation == "sdpa" and is_causal and query.shape[2] > 1
        return ReadMask(Causal(offset=0) if causal else Full(), None, None, None)
    sizes = (query.shape[0], query.shape[2], key.shape[2])
    return attend.cached_per_forward(attention_mask, "read", lambda given: read_attention_mask(given, sizes))
