"""Marks store in a configuration which backend of attnzoo a model requested.

transformers stores the selected implementation in the field ``config._attn_implementation``, and model code reads this
field in every forward. So the field must hold a name of transformers. The mark is a :class:`Served` in this field: a
string with this name that also holds the requested backend. Copies of the configuration keep the mark. If other code
sets the field, the mark and the request are lost.

transformers does not save the field. So the configuration also has the attribute ``attnzoo_backend``, a plain string
that ``save_pretrained`` writes to ``config.json``. A process without attnzoo ignores this entry.
"""

from __future__ import annotations

from typing import Any

KEY = "attnzoo_backend"


class Served(str):
    """The implementation that transformers sees (``"eager"`` or ``"sdpa"``), with the request for a backend of attnzoo.

    Attributes:
        text: the name of the requested backend, as in :class:`~attnzoo.installing.names.NamedBackend`.
        explicit: whether a user chose the backend for this model.
    """

    __slots__ = ("explicit", "text")

    text: str
    explicit: bool

    def __new__(cls, implementation: str, text: str, explicit: bool) -> Served:
        """Return ``implementation`` with a mark."""
        served = super().__new__(cls, implementation)
        served.text, served.explicit = text, explicit
        return served

    def __reduce__(self) -> Any:
        return Served, (str(self), self.text, self.explicit)


def mark_of(config: Any) -> Served | None:
    """Return the mark of a configuration, or None."""
    field = config._attn_implementation
    return field if isinstance(field, Served) else None


def saved_name(config: Any) -> object:
    """Return the name with which a configuration was saved, or None."""
    return vars(config).get(KEY)


def remembers(config: Any) -> bool:
    """Whether a configuration remembers a request."""
    return mark_of(config) is not None or saved_name(config) is not None


def remember(config: Any, served: Served) -> None:
    """Store a request in a configuration. Only a request that a user made is saved with the configuration."""
    # The public setter would also write into the configurations of submodels.
    config._attn_implementation_internal = served
    if served.explicit:
        setattr(config, KEY, served.text)
    else:
        vars(config).pop(KEY, None)


def forget(config: Any) -> None:
    """Remove the request from a configuration."""
    vars(config).pop(KEY, None)
    mark = mark_of(config)
    if mark is not None:
        config._attn_implementation_internal = str(mark)
