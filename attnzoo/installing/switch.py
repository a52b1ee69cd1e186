"""``model.set_attn_implementation`` with the names of backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attnzoo.installing.decision import Decide, choose
from attnzoo.installing.marks import KEY, Served, forget, remember, remembers
from attnzoo.installing.names import NamedBackend
from attnzoo.installing.requests import has_installed_patch, patch_again


def set_implementation(
    model: Any, implementation: str | Mapping[str, Any], theirs: Callable[[Any], None], check: Callable[[Any], Decide]
) -> None:
    """Set the attention implementation of a model and its parts, to names of transformers or of attnzoo.

    Args:
        model: a model of transformers.
        implementation: a name, or a mapping with one name per sub-configuration, as for transformers.
        theirs: transformers' ``set_attn_implementation`` of this model.
        check: returns transformers' decision for a part of the model.

    Raises:
        InvalidArgumentError, PatchError, BackendRefusedError: the model and its configurations are unchanged.
    """
    parts = _parts(model)
    names = dict(_names(model.config, implementation, list(parts)))
    chosen: dict[int, NamedBackend] = {}
    served: dict[int, str] = {}
    for key, name in names.items():
        if key in parts:
            served[key], backend = choose(parts[key], name, _keeping_field(parts[key], check(parts[key])))
            if backend is not None:
                chosen[key] = backend
    patched = has_installed_patch(model)
    configs = {id(config): config for config in (*_configs(model.config), *(part.config for part in parts.values()))}
    if not chosen and not patched and not any(map(remembers, configs.values())):
        theirs(implementation)
        return
    before = [(config, config._attn_implementation, vars(config).get(KEY)) for config in configs.values()]
    try:
        theirs(_with_served(model.config, implementation, served))
        for key in names.keys() & parts.keys():
            config = parts[key].config
            forget(config)
            if key in chosen:
                remember(config, Served(config._attn_implementation, chosen[key].text, explicit=True))
        if chosen or patched:
            patch_again(model)
    except BaseException:
        for config, field, saved in before:
            forget(config)
            config._attn_implementation_internal = field
            if saved is not None:
                setattr(config, KEY, saved)
        raise


def _parts(model: Any) -> dict[int, Any]:
    """Return ``{id(config): part}`` for the parts of a model. If parts share a configuration, the first part counts."""
    from transformers import PreTrainedModel

    parts: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            parts.setdefault(id(module.config), module)
    return parts


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for key in config.sub_configs:
        if getattr(config, key) is not None:
            yield from _configs(getattr(config, key))


def _names(config: Any, implementation: Any, unregistered: list[int]) -> Iterator[tuple[int, str]]:
    """Yield ``(id(config), requested name)``, without the configurations for which no name is requested.

    As in transformers, a part whose configuration is no sub-configuration gets the name of the whole model.
    """
    top = implementation.get("") if isinstance(implementation, Mapping) else implementation
    if isinstance(top, str):
        yield from ((key, top) for key in (*unregistered, id(config)))
    for key in config.sub_configs:
        below = implementation.get(key) if isinstance(implementation, Mapping) else implementation
        if below is not None and getattr(config, key) is not None:
            yield from _names(getattr(config, key), below, [])


def _with_served(config: Any, implementation: Any, served: Mapping[int, str]) -> Any:
    """Return ``implementation`` for transformers, with ``served`` names in place of the requested names."""
    top = implementation.get("") if isinstance(implementation, Mapping) else implementation
    top = served.get(id(config), top)
    if not config.sub_configs:
        return top
    result = {} if top is None else {"": top}
    for key in config.sub_configs:
        below = implementation.get(key) if isinstance(implementation, Mapping) else implementation
        if below is not None and getattr(config, key) is not None:
            result[key] = _with_served(getattr(config, key), below, served)
    return result


def _keeping_field(part: Any, decide: Decide) -> Decide:
    """Return ``decide`` with another default: the current implementation of the part, if adapters support it."""
    field = str(part.config._attn_implementation)
    return lambda name: field if name is None and field in ("eager", "sdpa") else decide(name)
