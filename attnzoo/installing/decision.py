"""Decide for one model whether its ``attn_implementation`` names a backend of attnzoo or is transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnzoo.errors import UnknownNameError, suggestion
from attnzoo.installing.marks import Served, forget, remember, saved_name
from attnzoo.installing.names import PREFIX, NamedBackend, is_ours, read_name
from attnzoo.registry import registry

# transformers' decision for one model: it returns the implementation to use, or raises for a name that it does not
# serve. None stands for transformers' default.
Decide = Callable[[str | None], str]


def decide(model: Any, implementation: str | None, default: str | None, theirs: Decide) -> str:
    """Return the implementation for transformers' field, and remember in the configuration what attnzoo has to run.

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
    """Return the backend that an earlier model with this configuration requested, or a saved model. None if neither."""
    if isinstance(implementation, Served) and implementation.explicit:
        return read_name(implementation.text)
    saved = saved_name(config)
    if implementation is None and saved is not None:
        return read_name(saved)
    return None


def choose(model: Any, implementation: str, theirs: Decide) -> tuple[str, NamedBackend | None]:
    """Return transformers' implementation for a name, and the backend if the name is not transformers' own.

    A name that transformers serves on the model is transformers' own, unless the name begins with ``attnzoo/``.

    Raises:
        UnknownNameError: neither transformers nor attnzoo knows the name, but attnzoo knows a similar name.
        The errors of transformers for a name that is transformers' own.
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
    """Whether an adapter exists for the model's family. Subclasses with another model type belong to the family."""
    configs = (getattr(cls, "config_class", None) for cls in type(model).__mro__)
    classes = (cls for config in (type(model.config), *configs) for cls in getattr(config, "__mro__", ()))
    types = {getattr(cls, "model_type", None) for cls in classes}
    return not types.isdisjoint(registry.model_types())
