"""Refuse keyword arguments that change the result of attention if no backend uses them. Ignore all other keywords.

Decoders of transformers pass all keywords that they do not use, such as ``num_items_in_batch``, to every attention
module. The attention functions for ``eager`` and ``sdpa`` read a few keywords by name and ignore the rest, which cannot
change the result. So a patched model also ignores most keywords. It refuses only two kinds of keywords:

- the keywords in ``UNCOMPUTED``: an attention function of transformers computes with them, but no backend does;
- keywords that the original attention function declares as parameters, but ``InterfacePoint.compute`` does not. A
  later release of transformers may add such parameters.

It also refuses the paged cache of continuous batching. Before transformers 5.24, this cache is the keyword ``cache`` of
the attention function. Since 5.24, it takes the place of the model's cache.

``eager`` and ``sdpa`` ignore ``cu_seq_lens_q`` and similar document boundaries, and so does a patched model. The model
builds the mask from ``position_ids``, so the mask already separates the documents of a packed row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from attnzoo.errors import KeywordRefusedError
from attnzoo.originals.fingerprint import path_of
from attnzoo.spec.segments import describe

# These keywords change the result in `eager`, `sdpa`, `flash_attention_2`, `flex_attention` or their paged forms.
UNCOMPUTED = frozenset({
    *("sliding_window", "softcap", "s_aux", "sinks", "head_mask", "position_bias"),
    *("cache", "block_table"),  # paged attention (continuous batching) keeps keys and values in a separate cache
})  # fmt: skip
_PAGED_CACHE = "transformers.generation.continuous_batching.cache:PagedAttentionCache"


def refuse_uncomputed(kwargs: Mapping[str, Any], names: frozenset[str] = UNCOMPUTED) -> None:
    """Raise :class:`KeywordRefusedError` if a keyword argument is one of ``names`` and its value is not None."""
    if names.isdisjoint(kwargs):
        return
    for keyword in sorted(names & kwargs.keys()):
        value = kwargs[keyword]
        if value is not None:
            plain = isinstance(value, (bool, int, float))
            got = describe(value) if isinstance(value, Tensor) else repr(value) if plain else type(value).__name__
            allowed = 'None. For other values, patch(..., fallback="native") runs the original code'
            raise KeywordRefusedError(keyword, got, allowed)


def check_keywords(module: nn.Module, kwargs: Mapping[str, Any], cache_names: tuple[str, ...]) -> None:
    """Before a forward starts, raise if a keyword argument changes the result but no backend uses it.

    Parameters that the module's forward declares pass this check, because the adapter handles them. A forward without
    ``**kwargs`` needs no check, because it raises a TypeError for unknown keywords. ``cache_names`` are the names of
    the keyword argument that contains the module's cache, which must not be a paged cache.
    """
    refuse_uncomputed(kwargs, _undeclared(type(module).forward))
    for name in cache_names:
        cls: Any = type(kwargs.get(name))
        if _is_paged(cls):
            refuse_uncomputed(kwargs, frozenset({name}))


@lru_cache(maxsize=256)
def _is_paged(cls: type) -> bool:
    return any(path_of(base) == _PAGED_CACHE for base in cls.__mro__)


@lru_cache(maxsize=256)
def _undeclared(forward: Callable[..., Any]) -> frozenset[str]:
    """Return the names in ``UNCOMPUTED`` that a forward accepts only through ``**kwargs``."""
    if inspect.getfullargspec(inspect.unwrap(forward)).varkw is None:
        return frozenset()
    return UNCOMPUTED - parameters(forward)


@lru_cache(maxsize=256)
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters that a function declares."""
    every = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return frozenset(parameter.name for parameter in every if parameter.kind not in variadic)
