"""Keyword arguments that models pass through to their attention: which of them attention may ignore.

Decoders of transformers hand every keyword that they do not know to every attention: labels shifted by the caller,
numbers for the loss, boundaries for other kernels. The attention functions that a patched model was loaded for
(``eager`` of the model's file, ``sdpa``) read a few keywords by name and ignore the rest. A patched model does the
same: to ignore what the original ignores changes no result, and to refuse it breaks calls that work unpatched. Two
kinds are refused by name instead:

- the keywords below, which some attention function of transformers computes with and no backend here does;
- whatever else the original's attention function declares as a parameter, in releases that add one.

``cu_seq_lens_q`` and the like are not among them: ``eager`` and ``sdpa`` see the documents of a packed row in the mask,
which the model makes of ``position_ids``, and ignore the boundaries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from attnzoo.errors import KeywordRefusedError
from attnzoo.spec.segments import describe

# Change what attention gives, in `eager`, `sdpa`, `flash_attention_2`, `flex_attention` or their paged forms.
UNCOMPUTED = frozenset({
    *("sliding_window", "softcap", "s_aux", "sinks", "head_mask", "position_bias"),
    *("cache", "block_table"),  # paged attention (continuous batching) keeps keys and values in a separate cache
})  # fmt: skip


def refuse_uncomputed(kwargs: Mapping[str, Any], also: Iterable[str] = (), known: Iterable[str] = ()) -> None:
    """Raise on keyword arguments that change what attention gives, and that no backend computes.

    Args:
        kwargs: keyword arguments; None means not given.
        also: more names to refuse.
        known: names that are computed here after all.

    Raises:
        KeywordRefusedError: names the first such keyword, what was got, and the remedy.
    """
    for keyword in sorted((UNCOMPUTED.union(also) & kwargs.keys()) - set(known)):
        given = kwargs[keyword]
        if given is not None:
            plain = isinstance(given, (bool, int, float))
            got = describe(given) if isinstance(given, Tensor) else repr(given) if plain else type(given).__name__
            raise KeywordRefusedError(
                keyword, got, 'None; patch(..., fallback="native") runs the model\'s own code where it is given'
            )


def check_keywords(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse what a call of a module asks for and no backend computes, before the module does anything.

    A parameter of the module's own forward is its adapter's business. A forward without ``**kwargs`` refuses unknown
    keywords itself, by TypeError.

    Raises:
        KeywordRefusedError: names the keyword.
    """
    forward = type(module).forward
    if not UNCOMPUTED.isdisjoint(kwargs) and inspect.getfullargspec(inspect.unwrap(forward)).varkw is not None:
        refuse_uncomputed(kwargs, known=parameters(forward))


@lru_cache(maxsize=256)
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters that a function declares."""
    every = inspect.signature(function).parameters.values()
    return frozenset(one.name for one in every if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD))
