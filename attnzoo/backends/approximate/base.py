"""The base class of ``blocked-local`` and ``lsh``, which replace dense attention by sparser attention.

Attention is dense if a query sees more keys as the sequence grows. These backends replace a dense
:class:`~attnzoo.spec.segments.Attention` by the *changed attention*, and an exact backend computes this attention.
Local attention stays unchanged, because it is fast already. Cross-attention stays unchanged, because distances between
its queries and keys have no meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from attnzoo.auto.selection import AutoBackend
from attnzoo.backend import Backend, Capabilities
from attnzoo.errors import InvalidArgumentError, Refusal, UnknownNameError
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Request, Result, Segment

LOCAL = (Window, Chunks)


def check_count(backend: str, option: str, value: object, minimum: int) -> None:
    """Raise unless the value of an option is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidArgumentError(f"{option} of backend {backend!r}", repr(value), f"an integer >= {minimum}")


@dataclass(frozen=True, kw_only=True)
class ApproximateBackend(Backend):
    """Base class of approximate backends.

    A subclass sets ``name`` and ``needed``, and implements ``describe``, ``rewrite_request`` and ``rewrite_dense``.

    Attributes:
        needed: the names of the options without which the backend refuses dense attention (class attribute).
        inner: the name of the exact backend that computes the changed attention. ``"auto"`` selects a backend.
        kept: whether this backend leaves all attention of its site unchanged. Only :meth:`bind_to_site` sets this.
    """

    needed: ClassVar[tuple[str, ...]] = ()
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        patterns=frozenset({Full, Causal, Window, Chunks, SortedChunks}),
        segments=1 << 16,
        key_mask=True,
        mask=True,
        bias=frozenset({"relative", "dense"}),
        bias_grad=True,
        gqa=True,
        uneven_value_dim=True,
        dropout=True,
        grad=True,
        exact=False,
    )

    inner: str = "auto"
    kept: bool = field(default=False, metadata={"option": False}, repr=False)

    def __post_init__(self) -> None:
        if self.inner == "auto":
            return
        exact = [name for info in registry.backends().values() if info.exact for name in (info.name, *info.aliases)]
        if self.inner not in exact:
            raise UnknownNameError(f"inner of backend {self.name!r}", self.inner, ("auto", *exact))

    def bind_to_site(self, site: tuple[Request, ...], patch: tuple[Request, ...]) -> Backend:
        """Return the backend for a site, given the requests of this site and of all sites of the ``patch`` call.

        A site with a request for local attention keeps its attention (:attr:`kept`). If the user has set none of the
        options in :attr:`needed`, one such request at any site is enough to keep the attention of all sites. So users
        can patch models with local attention without any option.
        """
        no_options = bool(self.needed) and len(self._missing()) == len(self.needed)
        kept = any(map(_is_local, site)) or (no_options and any(map(_is_local, patch)))
        return replace(self, kept=True) if kept else self

    def unused_options(self) -> tuple[str, ...]:
        """Return the options that have no effect, because the backend approximates nothing at the site.

        The option ``inner``, the backend that computes the attention, always has an effect.
        """
        options = [option for option in fields(self) if option.name in self.options() and option.name != "inner"]
        given = [option for option in options if self.kept and getattr(self, option.name) != option.default]
        return tuple(f"{option.name}={getattr(self, option.name)!r}" for option in given)

    def changes(self, request: Request) -> str | None:
        patterns = [segment.pattern for segment in request.segments]
        is_cross = all(isinstance(pattern, Full) and pattern.cross for pattern in patterns)
        return None if self.kept or _is_local(request) or is_cross else self.describe(request)

    def describe(self, request: Request) -> str:
        """Return a description of the keys that a query sees in the changed attention."""
        raise NotImplementedError

    def _missing(self) -> tuple[str, ...]:
        return tuple(option for option in self.needed if getattr(self, option) is None)

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        reasons = super().refusals(request)
        if self.changes(request) is not None:
            reasons += self._dense_refusals(request)
            if not reasons:
                request = self.rewrite_request(request)
        return reasons or _inner_refusals(self.inner, request)

    def _dense_refusals(self, request: Request) -> tuple[Refusal, ...]:
        missing = self._missing()
        if missing:
            options = ", ".join(f"{option}=..." for option in self.needed)
            allowed = f"{options} (this attention is dense; the backend needs these options to change the pattern)"
            return (Refusal("options", f"no value for {', '.join(missing)}", allowed),)
        if len(request.segments) > 1:
            return (Refusal("segments", f"dense attention with {len(request.segments)} segments", "1 segment"),)
        return self.more_refusals(request)

    def more_refusals(self, request: Request) -> tuple[Refusal, ...]:
        """Return the reasons why this backend cannot change a request with a single dense segment. By default none."""
        return ()

    def rewrite(self, attention: Attention, decisions: Any = None) -> Attention:
        if self.changes(attention.request()) is None:
            return attention
        return replace(attention, segments=self.rewrite_dense(attention, decisions))

    def rewrite_dense(self, attention: Attention, decisions: Any) -> tuple[Segment, ...]:
        """Return the segments of the changed attention, which replace the only segment of a dense attention."""
        raise NotImplementedError

    def rewrite_request(self, request: Request) -> Request:
        """Return the request of the changed attention, from the request of a dense attention."""
        raise NotImplementedError

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        rewritten = self.rewrite(attention)
        inner = AutoBackend() if self.inner == "auto" else registry.configure(self.inner)
        return execute(inner, rewritten, probabilities)


def _is_local(request: Request) -> bool:
    return any(isinstance(segment.pattern, LOCAL) for segment in request.segments)


def _inner_refusals(inner: str, request: Request) -> tuple[Refusal, ...]:
    """Return why the backend ``inner`` refuses the request. ``"auto"`` refuses only if every exact backend refuses."""
    candidates = registry.exact_backends() if inner == "auto" else (registry.configure(inner),)
    answers = [registry.refusals(candidate, request) for candidate in candidates]
    return tuple(dict.fromkeys(reason for reasons in answers for reason in reasons)) if all(answers) else ()
