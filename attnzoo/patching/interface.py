"""The point of models that look their attention function up in transformers' ``AttentionInterface``.

Such a module's forward calls ``ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, ...)``. The name is a
global of the modelling file and the field is on a config that models may share, so neither is touched: the module runs
its own forward, the same code object, with this one name bound to another object for this one instance.
Projections, rotary embeddings and caching stay the model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from attnzoo.adapter import Attend, Forward
from attnzoo.errors import BackendRefusedError, KeywordRefusedError, PatchError
from attnzoo.functional import compute_dtype
from attnzoo.patching.keywords import parameters, refuse_uncomputed
from attnzoo.spec.documents import attend_documents
from attnzoo.spec.masks import ReadMask, read_attention_mask
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Segment

_NAME = "ALL_ATTENTION_FUNCTIONS"


def rebind(function: Callable[..., Any], **names: Any) -> FunctionType:
    """The same function, code object and all, with other values for some of its global names.

    Raises:
        PatchError: not a plain function, or one that does not use a name given.
    """
    plain = inspect.unwrap(function)
    if not isinstance(plain, FunctionType) or any(name not in plain.__code__.co_names for name in names):
        raise PatchError(f"function: got {function!r}; allowed: a Python function that uses {sorted(names)}")
    twin = FunctionType(
        plain.__code__, {**plain.__globals__, **names}, plain.__name__, plain.__defaults__, plain.__closure__
    )
    twin.__kwdefaults__ = plain.__kwdefaults__
    return twin


def bind_interface(cls: Any, attend: Attend) -> Forward:
    """The forward of the class, whose attention function is the site's backend."""
    own = inspect.unwrap(cls.forward).__globals__.get(_NAME)
    return rebind(cls.forward, **{_NAME: _Interface(attend, own)})


def check_interface(module: nn.Module) -> None:
    """Raise unless the model builds the masks of ``eager`` or ``sdpa``, the formats this point reads exactly."""
    _check_implementation(_implementation(module))


def wants_probabilities(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether attention probabilities are asked for: by keyword, else by config."""
    asked = kwargs.get("output_attentions")
    return bool(getattr(module.config, "output_attentions", False) if asked is None else asked)


def _implementation(module: Any) -> str | None:
    """What the model's own forward looks up and its masks are built for: a private field, but the one it reads."""
    name: str | None = module.config._attn_implementation
    return name


def _check_implementation(name: str | None) -> None:
    if name not in ("eager", "sdpa"):
        raise PatchError(f"config._attn_implementation: got {name!r}; allowed: a model loaded with 'eager' or 'sdpa'")


class _Interface:
    """Stands where the modelling file expects ``ALL_ATTENTION_FUNCTIONS``."""

    def __init__(self, attend: Attend, own: Any) -> None:
        self._attend, self._own = attend, own

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        _check_implementation(name)

        def attention_function(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            own: Callable[..., tuple[Tensor, Tensor | None]] = self._own.get_interface(name, default)
            try:
                refuse_uncomputed(kwargs, also=parameters(own), known=_COMPUTED)
                return self._call(name, module, *args, **kwargs)
            except (BackendRefusedError, KeywordRefusedError):
                # The module's cache is filled by now: what falls back is the attention function, not the forward.
                if not self._attend.falls_back():
                    raise
                return own(module, *args, **kwargs)

        return attention_function

    def _call(
        self,
        name: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What an attention function of transformers does: returns ``(batch, q_len, heads, head_dim)`` and weights."""
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        read = read_interface_mask(self._attend, name, query, key, attention_mask, is_causal)
        dtype = compute_dtype(value)  # some models rotate or normalise queries and keys in float32 and leave them there
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        segment = Segment(key, value, read.pattern, read.key_mask, read.mask, read.bias)
        probabilities = wants_probabilities(module, kwargs)
        attention = Attention(query, (segment,), scale, dropout)
        result = attend_documents(self._attend, attention, read.documents, probabilities)
        weights = None if result.dropped is None else result.dropped[0]
        return result.output.transpose(1, 2).contiguous(), weights


_COMPUTED = parameters(_Interface._call)


def read_interface_mask(
    attend: Attend, name: str, query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool
) -> ReadMask:
    """What a mask built for the named implementation says.

    No mask means different things: for ``eager`` nothing is hidden; for ``sdpa`` the model relies on ``is_causal``,
    which torch aligns with key 0 (a prefill into an empty static cache), unless there is one query (decoding).
    """
    if attention_mask is None:
        causal = name == "sdpa" and is_causal and query.shape[2] > 1
        return ReadMask(Causal(offset=0) if causal else Full(), None, None, None)
    sizes = (query.shape[0], query.shape[2], key.shape[2])
    return attend.cached_per_forward(attention_mask, "read", lambda given: read_attention_mask(given, sizes))
