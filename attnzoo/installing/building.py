"""When a model of transformers is complete: after ``from_pretrained``, or at the last ``post_init`` of a constructor.

Every model of transformers calls ``post_init`` at the end of ``__init__``, and so does every model inside it. Only the
outermost model is patched, with all its parts, so there is one patch with one handle. ``from_pretrained`` builds the
model on the meta device first. The plan is then checked at ``post_init``, before any weight is loaded, and the patch
is put in place after ``from_pretrained``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from attnzoo.installing.requests import patch_as_requested, plan_built


class _Loading(threading.local):
    """The number of calls of ``from_pretrained`` that are running in this thread."""

    depth = 0


_loading = _Loading()


def finish_construction(model: Any) -> None:
    """Patch a model, or check its plan if ``from_pretrained`` is running. Do nothing inside another constructor.

    Call this function after each ``post_init``.
    """
    if _is_inside_constructor():
        return
    if _loading.depth:
        plan_built(model)
    else:
        patch_as_requested(model)


def load(from_pretrained: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``from_pretrained``, and patch the model. Return what ``from_pretrained`` returned."""
    _loading.depth += 1
    try:
        result = from_pretrained(*args, **kwargs)
    finally:
        _loading.depth -= 1
    patch_as_requested(result[0] if isinstance(result, tuple) else result)  # with output_loading_info=True, a tuple
    return result


def _is_inside_constructor() -> bool:
    """Whether a constructor is running around the caller of ``post_init`` that contains a call of ``post_init`` too.

    A model that such a constructor builds after this call is not patched. No model of transformers does this.

    The stack tells this even if an earlier constructor failed halfway. A list of models under construction would then
    keep the failed model. The constructor around may be that of a subclass, which adds modules to the same model.
    """
    from transformers import PreTrainedModel

    constructors, frame = 0, sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name == "__init__" and "post_init" in code.co_names and code.co_varnames:
            constructors += isinstance(frame.f_locals.get(code.co_varnames[0]), PreTrainedModel)
    return constructors > 1  # the innermost constructor has called post_init
