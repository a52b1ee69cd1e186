"""Continuous batching of transformers (``generate_batch``) on a patched model: refused where its caller sees it.

That engine keeps keys and values in a paged cache, which no backend reads. It runs the model in a thread that catches
every exception, so a refusal inside the forward ends as requests without tokens. All its entry points call
``model.init_continuous_batching`` first, in the caller's thread. While a patch would refuse, an instance attribute of
that name raises instead.
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
        '(generate_batch); allowed: patch(..., fallback="native"), backend="native", or attnzoo.unpatch(model) first'
    )


def guard(model: nn.Module) -> list[nn.Module]:
    """Refuse continuous batching on a model and the models in it while a patch needs that, and allow it otherwise.

    Call it after each change of patches. Returns the models that have continuous batching. It does not reach a model
    whose parts were patched by themselves: there the forward refuses ``cache`` in the engine's thread, and each request
    has the message as its ``error``.
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
