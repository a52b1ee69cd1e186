"""What ``blocked-local`` and ``lsh`` share: they change what dense attention looks at, and let another compute it.

Attention that is dense sees ever more keys as the sequence grows. Such attention is rewritten, its new form is exact
data like any other, and an exact backend runs it. Everything else is handed on as it is: attention that is local of
its own, and attention to another sequence, where nothing is near.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from attnzoo.auto.selection import AutoBackend
from attnzoo.backend import Backend, Capabilities
from attnzoo.errors import InvalidArgumentError, Refusal, UnknownNameError
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, SortedChunks, Window
from attnzoo.spec.segments import Attention, Request, Result, Segment

LOCAL = (Window, Chunks)


def check_count(backend: str, option: str, value: object, minimum: int) -> None:
    """Raise unless an option is an integer of at least this size."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidArgumentError(f"{option} of backend {backend!r}", repr(value), f"an integer >= {minimum}")


@dataclass(frozen=True, kw_only=True)
class ApproximateBackend(Backend):
    """Base class. Subclasses say which options dense attention needs, and how it is rewritten.

    Attributes:
        inner: the exact backend that computes, by name; ``"auto"`` chooses one.
        kept: the attention is bounded by the model itself, so that nothing of it is changed. Not an option:
            :meth:`bind_to_site` finds it out.
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

    # --- what is changed

    def bind_to_site(self, site: tuple[Request, ...], patch: tuple[Request, ...]) -> Backend:
        """A site that is local of its own is left alone, in whatever it asks (short inputs, global tokens, decoding).

        So is, without options, all that stands beside such a site: nothing of a model that is local needs options.
        """
        bare = bool(self.needed) and len(self._missing()) == len(self.needed)
        bounded = any(map(_is_local, site)) or (bare and any(map(_is_local, patch)))
        return replace(self, kept=True) if bounded else self

    def unused_options(self) -> tuple[str, ...]:
        """All but ``inner``, where the attention is kept."""
        own = [one for one in fields(self) if self.kept and one.name in self.options() and one.name != "inner"]
        given = {one.name: getattr(self, one.name) for one in own if getattr(self, one.name) != one.default}
        return tuple(f"{name}={value!r}" for name, value in given.items())

    def changes(self, request: Request) -> str | None:
        if self.kept or _is_local(request) or all(_is_cross(segment.pattern) for segment in request.segments):
            return None
        return self.describe(request)

    def describe(self, request: Request) -> str:
        """What dense attention sees here, in words."""
        raise NotImplementedError

    def _missing(self) -> tuple[str, ...]:
        return tuple(option for option in self.needed if getattr(self, option) is None)

    # --- what is refused

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        own = super().refusals(request)
        if self.changes(request) is not None:
            own += self._dense_refusals(request)
            if not own:
                request = self.rewrite_request(request)
        return own or _inner_refusals(self.inner, request)

    def _dense_refusals(self, request: Request) -> tuple[Refusal, ...]:
        missing = self._missing()
        if missing:
            options = ", ".join(f"{option}=..." for option in self.needed)
            allowed = f"{options}: this attention is dense, and becomes approximate"
            return (Refusal("options", f"no {', '.join(missing)}", allowed),)
        if len(request.segments) > 1:
            return (Refusal("segments", f"{len(request.segments)} dense ones", "1, or a local one among them"),)
        return self.more_refusals(request)

    def more_refusals(self, request: Request) -> tuple[Refusal, ...]:
        """Why a single dense segment cannot be rewritten."""
        return ()

    # --- what is computed

    def rewrite(self, attention: Attention, choices: Any = None) -> Attention:
        if self.changes(attention.request()) is None:
            return attention
        return replace(attention, segments=self.rewrite_dense(attention, choices))

    def rewrite_dense(self, attention: Attention, choices: Any) -> tuple[Segment, ...]:
        """What stands in place of the only segment."""
        raise NotImplementedError

    def rewrite_request(self, request: Request) -> Request:
        """The request of a rewritten attention, as far as one request tells another."""
        raise NotImplementedError

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        rewritten = self.rewrite(attention)
        inner = AutoBackend() if self.inner == "auto" else registry.configure(self.inner)
        return execute(inner, rewritten, probabilities)


def _is_local(request: Request) -> bool:
    return any(isinstance(segment.pattern, LOCAL) for segment in request.segments)


def _is_cross(pattern: Pattern) -> bool:
    return isinstance(pattern, Full) and pattern.cross


def _inner_refusals(inner: str, request: Request) -> tuple[Refusal, ...]:
    """Why the inner backend cannot run a request; for ``"auto"``: why no exact backend can."""
    candidates = registry.exact_backends() if inner == "auto" else (registry.configure(inner),)
    answers = [registry.refusals(candidate, request) for candidate in candidates]
    return tuple(dict.fromkeys(reason for reasons in answers for reason in reasons)) if all(answers) else ()
