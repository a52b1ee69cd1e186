"""The interface of backends: what a backend declares, and which methods an author of a backend implements.

A backend is a frozen dataclass whose fields are the options of the backend. A backend declares capabilities as data,
returns the reasons why it cannot run a request (:meth:`Backend.refusals`), and runs an
:class:`~attnzoo.spec.segments.Attention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import ClassVar

import torch

from attnzoo.errors import Refusal
from attnzoo.spec.patterns import Pattern
from attnzoo.spec.segments import FLOATS, Attention, Request, Result


def _names(items: Iterable[object]) -> str:
    return ", ".join(sorted(str(item).removeprefix("torch.") for item in items)) or "none"


@dataclass(frozen=True)
class Capabilities:
    """The features that a backend supports. The conformance kit generates test cases from these features.

    Attributes:
        devices: the supported device types, e.g. ``{"cpu", "cuda"}``.
        dtypes: the supported dtypes of query, key and value.
        patterns: the supported pattern classes.
        segments: the largest number of segments in one softmax.
        key_mask: whether the backend supports a key mask, which hides padding keys from all queries of a sample.
        mask: whether the backend supports a dense mask, which has one entry for each query and key.
        bias: the supported kinds of additive bias: a subset of ``{"relative", "dense"}``.
        bias_grad: whether the backend computes gradients of the bias values.
        gqa: whether the backend supports fewer key heads than query heads.
        uneven_value_dim: whether ``value_dim`` may differ from ``head_dim``.
        dropout: whether the backend supports dropout of softmax weights.
        grad: whether the backend has a backward pass.
        softcap: whether the backend limits scores (:attr:`Attention.softcap`).
        probabilities: whether the backend can return the softmax weights.
        transforms: the supported ``torch.func`` transforms: a subset of ``{"grad", "vmap", "jvp", "functionalize"}``.
        exact: False if the backend changes the pattern of dense attention (:meth:`Backend.changes`).

    Example:
        >>> import attnzoo
        >>> sdpa = attnzoo.backends()["sdpa"].capabilities
        >>> sdpa.exact, sdpa.dropout, sdpa.probabilities
        (True, True, False)
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
    softcap: bool = False
    probabilities: bool = False
    transforms: frozenset[str] = frozenset()
    exact: bool = True

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        """Return a :class:`Refusal` for every property of the request that these capabilities do not cover."""
        refused: list[Refusal] = []

        def check(field: str, requested: bool, supported: bool, allowed: str) -> None:
            if requested and not supported:
                refused.append(Refusal(field, "True", allowed))

        if request.device not in self.devices:
            refused.append(Refusal("device", request.device, _names(self.devices)))
        if request.dtype not in self.dtypes:
            refused.append(Refusal("dtype", _names([request.dtype]), _names(self.dtypes)))
        if len(request.segments) > self.segments:
            refused.append(Refusal("segments", str(len(request.segments)), f"at most {self.segments}"))
        for segment in request.segments:
            if type(segment.pattern) not in self.patterns:
                allowed = _names(pattern.__name__ for pattern in self.patterns)
                refused.append(Refusal("pattern", str(segment.pattern), allowed))
            if segment.bias is not None and segment.bias not in self.bias:
                refused.append(Refusal("bias", segment.bias, _names(self.bias)))
            elif segment.bias_grad and not self.bias_grad:
                refused.append(Refusal("bias", "values that require grad", "values that do not require grad"))
            if segment.kv_heads != request.heads and not self.gqa:
                refused.append(Refusal("key heads", str(segment.kv_heads), f"{request.heads}, like the query"))
        check("key_mask", any(segment.key_mask for segment in request.segments), self.key_mask, "no key mask")
        check("mask", any(segment.mask for segment in request.segments), self.mask, "no dense mask")
        if request.value_dim != request.head_dim and not self.uneven_value_dim:
            refused.append(Refusal("value_dim", str(request.value_dim), f"{request.head_dim}, the head_dim"))
        check("dropout", request.dropout, self.dropout, "dropout=0.0, or a model in eval mode")
        check("softcap", request.softcap, self.softcap, "no softcap")
        check("grad", request.grad, self.grad, "torch.no_grad(), or inputs that do not require grad")
        check("attention probabilities", request.probabilities, self.probabilities, "output_attentions=False")
        transforms = set(request.transforms) - self.transforms
        if transforms:
            refused.append(Refusal("torch.func transform", _names(transforms), _names(self.transforms)))
        return tuple(dict.fromkeys(refused))


@dataclass(frozen=True)
class Backend:
    """Base class of backends.

    A backend must set ``name`` and ``capabilities`` and implement :meth:`run`. The defaults of the other methods suit
    an exact backend without options.

    Class attributes:
        name: the name under which the backend is registered.
        aliases: alternative names that users may type.
        priority: if there are no measurements, ``auto`` selects the supporting backend with the highest priority
            (:meth:`priority_for`).
        dense: whether the backend stores all ``q_len x kv_len`` scores. ``tune`` skips the backend if memory is short.
        capabilities: the features that the backend supports.
        compiles: whether the first run of each kind of input compiles a kernel. For such a backend, ``tune`` and the
            benchmarks run a short input before they measure.
        example: the values of the required options for the support matrix and the tests.

    Example:
        A backend that supports one segment with neither masks nor bias, and has no backward pass:

        >>> import torch, attnzoo
        >>> class Tiny(attnzoo.Backend):
        ...     name = "tiny"
        ...     capabilities = attnzoo.Capabilities(devices=frozenset({"cpu"}), patterns=frozenset({attnzoo.Full}))
        ...     def run(self, attention, probabilities=False):
        ...         (segment,) = attention.segments
        ...         weights = (attention.query @ segment.key.mT * attention.scale).softmax(-1)
        ...         return attnzoo.Result(attention.fill(weights @ segment.value, None), kernel="tiny")
        >>> attnzoo.register_backend(Tiny).name
        'tiny'
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> attnzoo.attention(q, k, v, backend="tiny").shape
        torch.Size([1, 2, 5, 8])
        >>> attnzoo.unregister_backend("tiny")
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    priority: ClassVar[int] = 0
    dense: ClassVar[bool] = False
    capabilities: ClassVar[Capabilities] = Capabilities(devices=frozenset())
    compiles: ClassVar[bool] = False
    example: ClassVar[Mapping[str, object]] = {}

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        """Compute the attention. Every backend must implement this method.

        attnzoo calls ``run`` with autocast off, and only if :meth:`refusals` returned no reason for the request.

        Args:
            attention: query, segments, scale, dropout and masks, with checked shapes. Finish the output with
                :meth:`Attention.fill`, which zeroes padding rows and rows without visible keys.
            probabilities: whether to return the softmax weights too. Never True without ``capabilities.probabilities``.

        Returns:
            A :class:`Result` with the output ``(batch, heads, q_len, value_dim)`` and the name of the kernel that ran.
        """
        raise NotImplementedError

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why this backend cannot run on this machine and what to install. None means that there is no reason.

        Override this method if the backend needs a package or a device. If the method raises, this error is the reason.
        """
        return None

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the names of the options: all fields of the class except those with the metadata ``option: False``."""
        return tuple(option.name for option in fields(cls) if option.metadata.get("option", True))

    @classmethod
    def required_options(cls) -> tuple[str, ...]:
        """Return the names of the options without a default."""
        return tuple(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        """Return every reason why this backend cannot run the request. An empty tuple means that there is no reason.

        Override this method to add limits that :class:`Capabilities` cannot express, and extend the result of
        ``super()``. attnzoo caches the returned tuple by backend and request.
        """
        return self.capabilities.refusals(request)

    def priority_for(self, request: Request) -> int:
        """Return the priority of the backend for a request that the backend supports: :attr:`priority`.

        Override this method if the backend is the fastest for some requests, and not for others.
        """
        return self.priority

    def refusals_anywhere(self, request: Request) -> tuple[Refusal, ...]:
        """Return only the refusals that do not depend on the machine. The support matrix shows these refusals.

        Override this method if :meth:`refusals` depends on installed packages or devices.
        """
        return self.refusals(request)

    def bind_to_site(self, site: tuple[Request, ...], patch: tuple[Request, ...]) -> Backend:
        """Return the backend that serves one site of a patch: this backend, or a copy with other field values.

        Args:
            site: the expected requests of the site.
            patch: the expected requests of all sites of the patch that this backend serves.
        """
        return self

    def unused_options(self) -> tuple[str, ...]:
        """Return ``name=value`` of each option that the user set, but that has no effect at this backend's site."""
        return ()

    # Approximate backends (capabilities with ``exact=False``) override the next three methods.

    def changes(self, request: Request) -> str | None:
        """Return in words how this backend changes the request, or None if the backend changes nothing."""
        return None

    def decisions(self, attention: Attention) -> object:
        """Return what :meth:`rewrite` derives from tensor values, e.g. hash buckets. A later ``rewrite`` reuses it."""
        return None

    def rewrite(self, attention: Attention, decisions: object = None) -> Attention:
        """Return the attention that this backend and the oracle compute instead of ``attention``.

        The result must be computed from the tensors of ``attention``, so that gradients flow to these tensors.

        Args:
            attention: the requested attention.
            decisions: the result of :meth:`decisions` to reuse. None means that ``rewrite`` computes new decisions.
        """
        return attention

    def select(self, attention: Attention, probabilities: bool = False) -> Choice:
        """Return this backend as the choice for an attention. ``auto`` overrides this and selects another backend."""
        return Choice(self)


@dataclass(frozen=True)
class Choice:
    """The backend that runs an attention.

    Attributes:
        backend: the configured backend.
        reason: the reason why ``auto`` selected the backend. Empty means that the user requested the backend.
    """

    backend: Backend
    reason: str = ""

    def __hash__(self) -> int:
        return hash(self.reason)  # every call of a site counts its choice, and Python keeps the hash of a string

    def __str__(self) -> str:
        return f"{self.backend.name}: {self.reason}"


@dataclass(frozen=True)
class BackendInfo:
    """The information about one backend in the result of :func:`attnzoo.backends`.

    Attributes:
        name: the registered name.
        aliases: the alternative names of the backend.
        available: whether the backend can run on this machine.
        reason: the reason why the backend cannot run. Empty means that the backend can run.
        exact: whether the backend computes every request without changes.
        capabilities: the features that the backend supports. None means that the backend failed to load.
        options: the names of the backend's options.
    """

    name: str
    aliases: tuple[str, ...]
    available: bool
    reason: str
    exact: bool
    capabilities: Capabilities | None
    options: tuple[str, ...] = field(default=())
