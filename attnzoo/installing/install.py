"""Make transformers accept the names of backends as ``attn_implementation``, and undo this."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from attnzoo.errors import BackendRefusedError
from attnzoo.installing import hooks
from attnzoo.installing.names import read_name
from attnzoo.installing.settings import Settings, process, scoped
from attnzoo.refusal_cache import availability
from attnzoo.registry import registry

VARIABLE = "ATTNZOO_BACKEND"

_lock = threading.RLock()
_open_scopes: list[Settings] = []  # the open `with installed()` blocks of all threads


def install(default: str | None = None) -> None:
    """Make transformers accept the names of backends as ``attn_implementation``, in the whole process.

    From now on ``from_pretrained``, ``from_config``, ``pipeline(model_kwargs=...)``, ``Model(config)`` and
    ``model.set_attn_implementation`` accept backend names, aliases and variants for every model that
    :func:`attnzoo.patch` accepts. The model is then patched as by :func:`attnzoo.patch`, and :func:`attnzoo.handle`
    returns its handle. If transformers supports a name for a model (``"eager"`` for every model, ``"sdpa"`` for
    GPT-NeoX), the name selects transformers' code. ``"attnzoo/NAME"`` always means a backend of attnzoo.
    ``"NAME:option=value,..."`` sets options.

    ``save_pretrained`` writes the name to ``config.json``, as ``attnzoo_backend``. ``from_pretrained`` then uses the
    name, unless ``attn_implementation`` is given. Without ``install``, transformers ignores the entry.

    Args:
        default: the backend of models that are built without ``attn_implementation`` and have no saved name. The
            default applies only to families that have an adapter. None means the value of the environment variable
            ``ATTNZOO_BACKEND`` or, without this variable, transformers' default. A default is not saved with a model.

    A second call replaces the default of the first call.

    Raises:
        UnknownNameError, InvalidArgumentError: ``default`` names no backend.
        BackendRefusedError: this machine cannot run ``default``.
        PatchError: this version of transformers is not supported.

    Example:
        >>> import attnzoo
        >>> from transformers import AutoModel, LEDConfig
        >>> sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8)
        >>> attnzoo.install()
        >>> model = AutoModel.from_config(LEDConfig(vocab_size=9, **sizes), attn_implementation="sdpa")
        >>> attnzoo.uninstall()
        >>> {site.backend for site in attnzoo.handle(model).sites}
        {'sdpa'}
    """
    settings = _settings(default)
    with _lock:
        hooks.put()
        process.settings = settings


def uninstall() -> None:
    """Undo :func:`install`, and restore the methods of transformers. Do nothing if attnzoo is not installed.

    Models that were built before stay patched, and :func:`attnzoo.unpatch` removes their patch. Open ``with
    installed()`` blocks keep their effect until they end.

    Raises:
        PatchError: other code has replaced a method of transformers since ``install``. attnzoo stays installed.

    Example:
        >>> import attnzoo
        >>> attnzoo.install()
        >>> attnzoo.uninstall()
    """
    with _lock:
        if not _open_scopes:
            hooks.take_back()
        process.settings = None


@contextmanager
def installed(default: str | None = None) -> Iterator[None]:
    """Context manager that installs attnzoo for the code in a ``with`` block, in this thread or task only.

    Blocks may be nested, and attnzoo may also be installed in the whole process. The innermost block sets the default.

    Args:
        default: as for :func:`install`.

    Raises:
        AttnzooError: an error of :func:`install` or, at the end of the block, of :func:`uninstall`.

    Example:
        >>> import attnzoo
        >>> from transformers import LEDConfig, LEDModel
        >>> sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8)
        >>> with attnzoo.installed(default="sdpa"):
        ...     model = LEDModel(LEDConfig(vocab_size=9, **sizes))
        >>> attnzoo.is_patched(model), attnzoo.is_patched(LEDModel(model.config))
        (True, False)
    """
    settings = _settings(default)
    with _lock:
        hooks.put()
        _open_scopes.append(settings)
    token = scoped.set(settings)
    try:
        yield
    finally:
        scoped.reset(token)
        with _lock:
            _open_scopes.remove(settings)
            if not _open_scopes and process.settings is None:
                hooks.take_back()


def _settings(default: str | None) -> Settings:
    """Return checked settings. If ``default`` is None, the variable ``ATTNZOO_BACKEND`` sets the default."""
    argument, text = ("default", default) if default is not None else (VARIABLE, os.environ.get(VARIABLE) or None)
    if text is None:
        return Settings()
    named = read_name(text, argument=argument)
    reasons = availability(named.backend)
    if reasons:
        usable = tuple(backend.name for backend in registry.exact_backends())
        raise BackendRefusedError(named.backend.name, {argument: reasons}, {argument: usable})
    return Settings(named.text)
