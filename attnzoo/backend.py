"""How it is computed: what a backend declares and does.

A backend is a frozen dataclass: its fields are its options. It declares capabilities as data, answers
:meth:`Backend.refusals` with every reason it has, and runs an :class:`~attnzoo.spec.segments.Attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import ClassVar

import torch

from attnzoo.errors import Refusal
from attnzoo.spec.patterns import Pattern
from attnzoo.spec.segments import FLOATS, Attention, Request, Result


def _names(items: object) -> str:
    return ", ".join(sorted(str(item).removeprefix("torch.") for item in items)) or "none"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, as data; the conformance kit generates its cases from this.

    Attributes:
        devices: device types, e.g. ``{"cpu", "cuda"}``.
        dtypes: dtypes of query, key and value.
        patterns: pattern classes it computes exactly.
        segments: how many segments it can unite.
        key_mask: masks keys per sample.
        mask: takes a dense mask.
        bias: kinds of additive bias, of ``"relative"`` and ``"dense"``.
        bias_grad: gives gradients to the bias values.
        gqa: takes fewer key heads than query heads.
        uneven_value_dim: takes a value_dim other than head_dim.
        dropout: drops softmax weights.
        grad: has a backward.
        probabilities: can return the softmax weights.
        transforms: function transforms it runs under, of ``"grad"``, ``"vmap"``, ``"jvp"`` and ``"functionalize"`` of
            ``torch.func``.
        exact: computes exactly what any request says (False: changes the pattern of dense attention, see
            :meth:`Backend.changes`).
    """

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype] = frozenset(FLOATS)
    patterns: frozenset[type[Pattern]] = frozenset()
    segments: int = 1
    key_mask: bool = False
    mask: bool = False
    bias: frozenset[str] = frozenset()
    bias_grad: bool = False
    gqa: bool = False
    uneven_value_dim: bool = False
    dropout: bool = False
    grad: bool = False
    probabilities: bool = False
    transforms: frozenset[str] = frozenset()
    exact: bool = True

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        """Every way in which the request goes beyond these capabilities."""
        found: list[Refusal] = []

        def need(name: str, wanted: bool, offered: bool, allowed: str) -> None:
            if wanted and not offered:
                found.append(Refusal(name, "requested", allowed))

        if request.device not in self.devices:
            found.append(Refusal("device", request.device, _names(self.devices)))
        if request.dtype not in self.dtypes:
            found.append(Refusal("dtype", _names([request.dtype]), _names(self.dtypes)))
        if len(request.segments) > self.segments:
            found.append(Refusal("segments", str(len(request.segments)), f"at most {self.segments}"))
        for segment in request.segments:
            if type(segment.pattern) not in self.patterns:
                found.append(Refusal("pattern", str(segment.pattern), _names(kind.__name__ for kind in self.patterns)))
            if segment.bias is not None and segment.bias not in self.bias:
                found.append(Refusal("bias", segment.bias, _names(self.bias)))
            elif segment.bias_grad and not self.bias_grad:
                found.append(Refusal("bias", "values that require grad", "values that do not require grad"))
            if segment.kv_heads != request.heads and not self.gqa:
                found.append(Refusal("key heads", str(segment.kv_heads), f"{request.heads}, the query's"))
        need("key_mask", any(segment.key_mask for segment in request.segments), self.key_mask, "no key mask")
        need("mask", any(segment.mask for segment in request.segments), self.mask, "no dense mask")
        if request.value_dim != request.head_dim and not self.uneven_value_dim:
            found.append(Refusal("value_dim", str(request.value_dim), f"{request.head_dim}, the head_dim"))
        need("dropout", request.dropout, self.dropout, "dropout=0.0")
        need("grad", request.grad, self.grad, "torch.no_grad(), or inputs that do not require grad")
        need("attention probabilities", request.probabilities, self.probabilities, "output_attentions=False")
        transforms = set(request.transforms) - self.transforms
        if transforms:
            found.append(Refusal("torch.func transform", _names(transforms), _names(self.transforms)))
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Backend:
    """Base class of all backends. Subclasses set the class attributes and implement :meth:`run`.

    Class attributes:
        name: the registered name.
        aliases: other names users may type.
        priority: where nothing was measured, ``auto`` takes the available backend of highest priority that refuses
            nothing.
        dense: needs memory for every query and key; ``tune`` leaves it out where that is much.
        capabilities: what it can do.
        compiles: the first run of a kind compiles a kernel; who measures runs a short input first.
        example: values of the options it needs, to show it with in the support matrix and to test it with.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    priority: ClassVar[int] = 0
    dense: ClassVar[bool] = False
    capabilities: ClassVar[Capabilities] = Capabilities(devices=frozenset())
    compiles: ClassVar[bool] = False
    example: ClassVar[Mapping[str, object]] = {}

    @classmethod
    def unavailable(cls) -> str | None:
        """Why this backend cannot run on this machine and what to install, or None if it can."""
        return None

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the options ``patch(model, backend, **options)`` takes: fields, unless their metadata denies it."""
        return tuple(option.name for option in fields(cls) if option.metadata.get("option", True))

    @classmethod
    def required_options(cls) -> tuple[str, ...]:
        """Names of the options without a default."""
        return tuple(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        """All reasons why this request cannot run here; empty means it runs."""
        return self.capabilities.refusals(request)

    def refusals_anywhere(self, request: Request) -> tuple[Refusal, ...]:
        """The reasons that hold on every machine, whatever it has installed: what the support matrix shows."""
        return self.refusals(request)

    def bind_to_site(self, site: tuple[Request, ...], patch: tuple[Request, ...]) -> Backend:
        """This backend as it serves one site.

        Args:
            site: what the site is expected to ask.
            patch: what all sites that get this backend in the same patch are expected to ask.
        """
        return self

    def unused_options(self) -> tuple[str, ...]:
        """Which of its options, as ``name=value``, were given and do nothing at the site it was settled for."""
        return ()

    def changes(self, request: Request) -> str | None:
        """What of the request is not computed as it says, in words; None: nothing, the backend is exact here."""
        return None

    def choices(self, attention: Attention) -> object:
        """What :meth:`rewrite` decides by the values of the tensors (hash buckets, say), for a rewrite to repeat."""
        return None

    def rewrite(self, attention: Attention, choices: object = None) -> Attention:
        """The attention that is really computed, and by which this backend is judged.

        The attention itself, unless :meth:`changes` says otherwise. Its tensors are made of the attention's, so that
        gradients flow.

        Args:
            attention: what was asked for.
            choices: those of another run, e.g. in another dtype, to be repeated; None: the attention's own.
        """
        return attention

    def select(self, attention: Attention, probabilities: bool = False) -> Choice:
        """Return the backend that runs an attention: this backend itself; ``auto`` selects one per attention."""
        return Choice(self)

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        """Compute the attention. Only called with requests that were not refused."""
        raise NotImplementedError


@dataclass(frozen=True)
class Choice:
    """The backend that runs an attention.

    Attributes:
        backend: the backend, configured.
        reason: why ``auto`` selected it; empty for a backend that was requested.
    """

    backend: Backend
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.backend.name}: {self.reason}"


@dataclass(frozen=True)
class BackendInfo:
    """What :func:`attnzoo.backends` tells of a backend."""

    name: str
    aliases: tuple[str, ...]
    available: bool
    reason: str
    exact: bool
    capabilities: Capabilities | None
    options: tuple[str, ...] = field(default=())
