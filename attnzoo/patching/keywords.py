"""Keyword arguments that models pass to their attention: which are ignored, and which are refused.

Decoders of transformers pass every keyword they do not know to every attention: shifted labels, numbers for the loss,
boundaries for other kernels. The attention functions of a model loaded with ``eager`` or ``sdpa`` read a few keywords
by name and ignore the rest. A patched model ignores them too: they do not change the result, and to refuse them would
break calls that work unpatched. It refuses two kinds by name:

- the keywords below, which some attention function of transformers computes with and no backend does;
- any other parameter that the original's attention function declares: a later release may add one.

``cu_seq_lens_q`` and the like are ignored: ``eager`` and ``sdpa`` see the documents of a packed row in the mask, which
the model makes of ``position_ids``, and ignore the boundaries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from attnzoo.errors import KeywordRefusedError
from attnzoo.spec.segments import describe

# These change the result, in `eager`, `sdpa`, `flash_attention_2`, `flex_attention` or their paged forms.
UNCOMPUTED = frozenset({
    *("sliding_window", "softcap", "s_aux", "sinks", "head_mask", "position_bias"),
    *("cache", "block_table"),  # paged attention (continuous batching) keeps keys and values in a separate cache
})  # fmt: skip


def refuse_uncomputed(kwargs: Mapping[str, Any], also: Iterable[str] = (), known: Iterable[str] = ()) -> None:
    """Raise :class:`KeywordRefusedError` if a keyword argument changes the result and no backend computes with it.

    A value of None counts as not given. ``also`` has more names to refuse, ``known`` those the caller computes with.
    """
    for keyword in sorted((UNCOMPUTED.union(also) & kwargs.keys()) - set(known)):
        value = kwargs[keyword]
        if value is not None:
            plain = isinstance(value, (bool, int, float))
            got = describe(value) if isinstance(value, Tensor) else repr(value) if plain else type(value).__name__
            allowed = 'None; patch(..., fallback="native") runs the model\'s own code where it is given'
            raise KeywordRefusedError(keyword, got, allowed)


def check_keywords(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise :class:`KeywordRefusedError` before the module does anything, if no backend computes with a keyword.

    The adapter handles the parameters of the module's forward. A forward without ``**kwargs`` refuses unknown keywords
    itself, with a TypeError.
    """
    forward = type(module).forward
    if not UNCOMPUTED.isdisjoint(kwargs) and inspect.getfullargspec(inspect.unwrap(forward)).varkw is not None:
        refuse_uncomputed(kwargs, known=parameters(forward))


@lru_cache(maxsize=256)
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters that a function declares."""
    every = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return frozenset(parameter.name for parameter in every if parameter.kind not in variadic)
