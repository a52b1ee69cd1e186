"""The methods of transformers' ``PreTrainedModel`` that ``install`` wraps, and their exact restoration.

``__init__`` of a model asks ``_check_and_adjust_attn_implementation`` which implementation to use. attnzoo wraps this
private method because every way of building a model calls it. The other three methods are public. attnzoo registers
nothing in ``AttentionInterface``, because LED, for example, does not call this interface and ignores registered names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from attnzoo.errors import PatchError
from attnzoo.installing.building import finish_construction, load
from attnzoo.installing.decision import Decide, decide
from attnzoo.installing.requests import has_installed_patch
from attnzoo.installing.settings import active_settings
from attnzoo.installing.switch import set_implementation

_DECISION = "_check_and_adjust_attn_implementation"
_PARAMETERS = ["self", "attn_implementation", "is_init_check", "allow_all_kernels"]
_FIELD = "_attn_implementation_internal"

# {method name: (attribute of PreTrainedModel before install, wrapper)}. Empty if attnzoo is not installed.
_in_place: dict[str, tuple[Any, Any]] = {}


def put() -> None:
    """Wrap the methods of ``PreTrainedModel``. Do nothing if they are wrapped.

    Raises:
        PatchError: this version of transformers selects the implementation in another way.
    """
    from transformers import PreTrainedModel

    if _in_place:
        return
    _check_transformers(PreTrainedModel)
    before = vars(PreTrainedModel)
    wrappers = {
        _DECISION: _decision(before[_DECISION]),
        "post_init": _post_init(before["post_init"]),
        "from_pretrained": classmethod(_from_pretrained(before["from_pretrained"].__func__)),
        "set_attn_implementation": _set_attn_implementation(before["set_attn_implementation"], before[_DECISION]),
    }
    _in_place.update({name: (before[name], wrapper) for name, wrapper in wrappers.items()})
    for name, wrapper in wrappers.items():
        setattr(PreTrainedModel, name, wrapper)


def take_back() -> None:
    """Restore the methods of ``PreTrainedModel``. Do nothing if they are not wrapped.

    Raises:
        PatchError: other code has replaced a wrapper. All wrappers stay in place.
    """
    from transformers import PreTrainedModel

    for name, (_, wrapper) in _in_place.items():
        if vars(PreTrainedModel)[name] is not wrapper:
            raise PatchError(
                f"uninstall: got PreTrainedModel.{name}, which other code has replaced since attnzoo.install(); "
                "allowed: the wrapper of attnzoo (restore it first)"
            )
    for name, (original, _) in _in_place.items():
        setattr(PreTrainedModel, name, original)
    _in_place.clear()


def _check_transformers(cls: Any) -> None:
    """Raise unless ``__init__`` selects the implementation as in transformers 5.17 to 5.24."""
    import transformers

    method = vars(cls).get(_DECISION)
    used = cls.__init__.__code__.co_names
    parameters = list(inspect.signature(method).parameters) if method is not None else None
    if parameters != _PARAMETERS or _DECISION not in used or _FIELD not in used:
        raise PatchError(
            f"install: got transformers {transformers.__version__}, in which PreTrainedModel.{_DECISION} has the "
            f"parameters {parameters} or is not used by __init__; allowed: a version with the parameters {_PARAMETERS}"
        )


def _decision(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def wrapper(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        def theirs(name: str | None) -> str:
            return original(self, name, *args, **kwargs)

        settings = active_settings()
        if settings is None:
            return theirs(attn_implementation)
        return decide(self, attn_implementation, settings.default, theirs)

    return wrapper


def _post_init(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def wrapper(self: Any) -> None:
        original(self)
        if active_settings() is not None:
            finish_construction(self)

    return wrapper


def _from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if active_settings() is None:
            return original(cls, *args, **kwargs)
        return load(original, cls, *args, **kwargs)

    return wrapper


def _set_attn_implementation(original: Callable[..., None], check: Callable[..., str]) -> Callable[..., None]:
    @functools.wraps(original)
    def wrapper(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        def theirs(implementation: Any) -> None:
            original(self, implementation, *args, **kwargs)

        def check_part(part: Any) -> Decide:
            return lambda name: check(part, name, False, *args, **kwargs)

        if active_settings() is None and not has_installed_patch(self):
            theirs(attn_implementation)
        else:
            set_implementation(self, attn_implementation, theirs, check_part)

    return wrapper
