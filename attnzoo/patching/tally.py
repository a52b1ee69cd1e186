"""Count the attentions of the whole process by backend, from the counts of the sites.

A site counts its attentions in any case, so a call costs nothing more. The tally only knows which sites exist. When
Python frees a site, the tally keeps the site's counts.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnzoo.patching.sites import Site

# Reentrant, because a garbage collection inside a locked section may free a site in the same thread.
_lock = threading.RLock()
# For each site: a reference, and the counts with which the site began. The copy of a site begins with the counts of
# the original, which would count twice.
_sites: dict[int, tuple[weakref.ref[Site], Counter[str]]] = {}
_freed: Counter[str] = Counter()


def calls_by_backend(site: Site) -> Counter[str]:
    """Return how many attentions of a site ran on each backend. The model's original code is the backend ``native``."""
    kernels, selections = site.kernels.copy(), site.selections.copy()  # other threads may be counting
    calls: Counter[str] = Counter()
    for choice, count in selections.items():
        calls[choice.backend.name] += count
    native = max(kernels["native"] - calls["native"], 0)  # calls that `auto` did not select
    calls["native"] += native + site.fallbacks
    calls[site.backend] += kernels.total() - native - selections.total()
    return +calls


def begin(site: Site) -> None:
    """Include a new site in the tally."""
    with _lock:
        _sites[id(site)] = (weakref.ref(site), calls_by_backend(site))


def end(site: Site) -> None:
    """Keep the counts of a site that Python is about to free."""
    with _lock:
        _, before = _sites.pop(id(site), (None, None))
        if before is not None:
            _freed.update(calls_by_backend(site) - before)


def stats() -> dict[str, int]:
    """Return how many attentions ran on each backend since the start of the process, in all models.

    The counts include models that no longer exist. To count a part of a program, subtract two results.

    Returns:
        ``{backend: calls}``. If ``auto`` selected a backend, the call counts for the selected backend. ``"native"``
        counts the calls that ran a model's original code in a patched model: by request, or as a fallback. Models that
        are not patched are not counted.

    Example:
        >>> import torch, attnzoo
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> model = GPTNeoXModel(GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).eval()
        >>> before = attnzoo.stats()
        >>> with attnzoo.patch(model, "sdpa"), torch.no_grad():
        ...     output = model(torch.ones(1, 4, dtype=torch.long))
        >>> attnzoo.stats()["sdpa"] - before.get("sdpa", 0)
        2
    """
    with _lock:
        total = Counter(_freed)
        for reference, before in list(_sites.values()):
            site = reference()
            if site is not None:
                total.update(calls_by_backend(site) - before)
        return dict(sorted(total.items()))
