"""Continuous batching of transformers (``generate_batch``) on a patched model: refused where its caller sees it.

That engine keeps keys and values in a paged cache, which its own attention functions fill and read; no backend does.
It runs the model in a thread that catches whatever is raised there, so a refusal within the forward ends as requests
without tokens. All its entry points call ``model.init_continuous_batching`` first, in the caller's thread: while a
patch would refuse, an instance attribute stands in for that method.
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
    """Refuse continuous batching on a model and the models in it while a patch needs it; else let it through.

    To be called after each change of patches. A model whose parts were patched by themselves is not reached: there the
    forward refuses ``cache`` in the engine's thread, and the requests carry the message as their ``error``.

    Returns:
        The models that have continuous batching.
    """
    models = [module for module in model.modules() if hasattr(type(module), _ENTRY)]
    for module in models:
        if any(map(_refuses, module.modules())):
            vars(module)[_ENTRY] = _refuse
        elif vars(module).get(_ENTRY) is _refuse:
            del vars(module)[_ENTRY]
    return models


def _refuses(module: nn.Module) -> bool:
    """Whether the patch that runs at a module, if any, would raise on a paged cache."""
    patched = next(patches_of(module), None)
    return patched is not None and patched.point.attends and not (patched.native or patched.fallback)
