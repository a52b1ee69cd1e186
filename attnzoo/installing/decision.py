"""Decide whether the ``attn_implementation`` of a model means a backend of attnzoo or code of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnzoo.errors import UnknownNameError, suggestion
from attnzoo.installing.marks import Served, forget, remember, saved_name
from attnzoo.installing.names import PREFIX, NamedBackend, is_ours, read_name
from attnzoo.registry import registry

# transformers' decision for one model: a function from a requested name to the implementation to use. The function
# raises if transformers does not support the name for the model. The name None requests transformers' default.
Decide = Callable[[str | None], str]


def decide(model: Any, implementation: str | None, default: str | None, theirs: Decide) -> str:
    """Return the implementation for transformers' field, and store the requested backend in the configuration.

    Args:
        model: the model under construction. Only its class and configuration are complete.
        implementation: what the configuration requests, or None.
        default: the name of the backend for models without a request, or None.
        theirs: transformers' decision.
    """
    config = model.config
    backend = _remembered(config, implementation)
    if backend is None and isinstance(implementation, str) and not isinstance(implementation, Served):
        served, backend = choose(model, implementation, theirs)
    elif backend is None:
        served = theirs(None)
        if default is not None and is_supported(model):
            backend = read_name(default, explicit=False)
    else:
        served = theirs(None)
    if backend is None:
        forget(config)
        return served
    mark = Served(served, backend.text, backend.explicit)
    remember(config, mark)
    return mark


def _remembered(config: Any, implementation: str | None) -> NamedBackend | None:
    """Return the backend that the configuration stores from an earlier model or from ``config.json``, or None."""
    if isinstance(implementation, Served) and implementation.explicit:
        return read_name(implementation.text)
    saved = saved_name(config)
    if implementation is None and saved is not None:
        return read_name(saved)
    return None


def choose(model: Any, implementation: str, theirs: Decide) -> tuple[str, NamedBackend | None]:
    """Return the implementation that transformers uses, and the backend that the name means (None: no backend).

    A name means a backend if it begins with ``attnzoo/``, or if transformers does not support the name for this model.

    Raises:
        UnknownNameError: neither transformers nor attnzoo knows the name, but attnzoo knows a similar name.
        ValueError, ImportError: transformers refuses the name, and attnzoo knows no similar name.
    """
    if implementation.startswith(PREFIX):
        return theirs(None), read_name(implementation)
    try:
        return theirs(implementation), None
    except (ValueError, ImportError) as error:  # unknown name, unsupported by the model, or a package is missing
        if is_ours(implementation):
            return theirs(None), read_name(implementation)
        if _is_misspelled(implementation):
            also = f"a name that transformers serves on {type(model).__name__}"
            raise UnknownNameError("attn_implementation", implementation, registry.names(), also) from error
        raise


def _is_misspelled(implementation: str) -> bool:
    from transformers import AttentionInterface

    return implementation not in AttentionInterface().valid_keys() and bool(
        suggestion(implementation, registry.names())
    )


def is_supported(model: Any) -> bool:
    """Whether an adapter exists for the model's family. A subclass with another model type belongs to the family."""
    configs = (getattr(cls, "config_class", None) for cls in type(model).__mro__)
    classes = (cls for config in (type(model.config), *configs) for cls in getattr(config, "__mro__", ()))
    types = {getattr(cls, "model_type", None) for cls in classes}
    return not types.isdisjoint(registry.model_types())
