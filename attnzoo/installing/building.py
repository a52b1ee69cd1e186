"""Patch a model when transformers has finished building it.

Every model of transformers calls ``post_init`` at the end of its ``__init__``. Models inside the model do so too.
attnzoo waits for the ``post_init`` of the outermost model, and then patches this model with all its parts. So there is
one patch with one handle. ``from_pretrained`` builds the model before it loads weights. Then attnzoo only checks the
plan in ``post_init``, and patches the model after ``from_pretrained``.
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
    """Whether the current call of ``post_init`` comes from inside another constructor that calls ``post_init`` too.

    The outer constructor belongs to a model that contains this model, or to a subclass that adds modules to the same
    model. If the outer constructor builds a model after its call of ``post_init``, that model is never patched. No
    model of transformers does this.

    The function reads the stack, because a list of models under construction would keep a model whose constructor
    raised.
    """
    from transformers import PreTrainedModel

    constructors, frame = 0, sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name == "__init__" and "post_init" in code.co_names and code.co_varnames:
            constructors += isinstance(frame.f_locals.get(code.co_varnames[0]), PreTrainedModel)
    return constructors > 1  # the innermost constructor has called post_init
