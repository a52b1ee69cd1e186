"""Refuse continuous batching of transformers (``generate_batch``) on a patched model, in the caller's thread.

Continuous batching keeps keys and values in a paged cache, which no backend reads. The model runs in a thread that
catches every exception. So if a forward refused the cache, the call would not raise, but return requests without
tokens. Each function that starts continuous batching first calls ``model.init_continuous_batching`` in the caller's
thread. While a model has a patch that refuses the paged cache, attnzoo replaces this method by a function that raises
an error.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from attnzoo.errors import PatchError
from attnzoo.patching.forwards import patches_of

_ENTRY = "init_continuous_batching"


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise PatchError(
        f"{_ENTRY}: got a patched model, whose backends do not read the paged cache of continuous batching "
        '(generate_batch); allowed: a model patched with fallback="native" or backend="native", or a model without a '
        "patch (call attnzoo.unpatch(model))"
    )


def guard(model: nn.Module) -> list[nn.Module]:
    """Block continuous batching in each model inside ``model`` whose patches refuse it, and unblock all other models.

    Call this function after each change of patches. Return the models inside ``model`` that have continuous batching.
    If only a part of a model was passed to ``patch``, continuous batching of the whole model is not blocked. In the
    thread of continuous batching, the patched forwards then refuse the keyword ``cache``. Each generation request of
    transformers gets this refusal as its ``error``.
    """
    models = [module for module in model.modules() if hasattr(type(module), _ENTRY)]
    for module in models:
        if any(map(_refuses_paged_cache, module.modules())):
            vars(module)[_ENTRY] = _refuse
        elif vars(module).get(_ENTRY) is _refuse:
            del vars(module)[_ENTRY]
    return models


def _refuses_paged_cache(module: nn.Module) -> bool:
    patched = next(patches_of(module), None)
    return patched is not None and patched.point.attends and not patched.may_run_native
