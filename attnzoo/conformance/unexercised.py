"""Which declared properties of a backend no case of the kit exercised: nothing is known about these properties."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, cast

from attnzoo.backend import Capabilities
from attnzoo.spec.segments import Request

_NEVER_REFUSED = ("devices", "exact")  # the kit runs on one device, and ``exact`` limits no request
_SINGULAR = {"dtypes": "dtype", "patterns": "pattern", "transforms": "transform"}


def unexercised(capabilities: Capabilities, asked: Iterable[Request], ran: Iterable[Request]) -> tuple[str, ...]:
    """Return the declared properties of the requests ``asked`` that no request of ``ran`` has.

    A request has a property if capabilities without the property refuse the request for one more reason. Examples of
    names are ``"pattern Window"`` and ``"gqa"``.

    Args:
        capabilities: the declared properties.
        asked: the requests of all cases. A property that no case has, such as an unchecked dtype, is not in the result.
        ran: the requests that the backend did not refuse.
    """
    reasons = {request: len(capabilities.refusals(request)) for request in {*asked, *ran}}
    run = set(ran)

    def missing(narrower: Capabilities) -> bool:
        having = [request for request, count in reasons.items() if len(narrower.refusals(request)) > count]
        return bool(having) and run.isdisjoint(having)

    return tuple(name for name, narrower in _without_one_property(capabilities) if missing(narrower))


def _without_one_property(capabilities: Capabilities) -> Iterator[tuple[str, Capabilities]]:
    """Yield the name of each declared property, with capabilities that lack only this property."""
    for field in fields(capabilities):
        name, declared, default = field.name, cast(Any, getattr(capabilities, field.name)), cast(Any, field.default)
        if name in _NEVER_REFUSED:
            continue
        if isinstance(declared, frozenset):
            for item in sorted(declared, key=_text):
                narrower: Any = declared - {item}
                yield f"{_SINGULAR.get(name, name)} {_text(item)}", replace(capabilities, **{name: narrower})
        elif declared != default:
            yield name, replace(capabilities, **{name: default})


def _text(item: object) -> str:
    return item.__name__ if isinstance(item, type) else str(item).removeprefix("torch.")
